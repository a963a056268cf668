"""At the size of LLaDA-8B: what a step needs, calculated, and what a GPU does, measured."""
