"""A little text in the language of the small models, the same everywhere."""

from __future__ import annotations

_STORY = (
    "Once upon a time there was a little girl named Lily. She had a red ball and a small dog. "
    "One day the dog ran into the garden and hid the ball under a big tree. Lily looked in the "
    "house, then in the box, and then she looked up. A bird said that the ball was near. "
    "She was happy and gave the bird some bread.\n"
)
_NAMES = ("Lily", "Anna", "Mia", "Sue", "Amy", "Zoe")

STORIES = "".join(_STORY.replace("Lily", name) for name in _NAMES * 2).encode()
