"""Gymnasium's own wrappers: the return of every episode, and a video of each as a canvas fills.

Needs ``pip install "dllm-gym[video]"``.
"""

from pathlib import Path

import gymnasium as gym
from gymnasium.wrappers import RecordEpisodeStatistics, RecordVideo

import dllm_gym  # noqa: F401  (registers the ids)


def main(folder: str | Path = "runs/videos", episodes: int = 2) -> list[float]:
    env = gym.make("MaskedDiffusion-Countdown-v0", split="test", render_mode="rgb_array")
    env = RecordEpisodeStatistics(RecordVideo(env, str(folder), episode_trigger=lambda episode: True))
    returns = []
    for episode in range(episodes):
        observation, info = env.reset(seed=episode)
        while "episode" not in info:
            observation, _, _, _, info = env.step(observation["confidence"][:, 0] > 0.9)
        returns.append(float(info["episode"]["r"]))
        print(f"{info['completion']!r}: return {returns[-1]:.2f} after {info['episode']['l']} steps")
    env.close()  # writes the last video
    print(*sorted(Path(folder).glob("*.mp4")), sep="\n")
    return returns


if __name__ == "__main__":
    main()
