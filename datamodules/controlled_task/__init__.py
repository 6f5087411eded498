"""A preference task with exact ground truth: dialogues about animals whose responses have a known reward.

A prompt states four facts about an animal and asks for two of them. A response is malformed or rude (reward 0),
off-topic (1), or gives two wrong values (2), one right value (3) or two right values (4); a polite opener adds 0.5.
Labels are flipped at a known rate, and the length of a well-formed response says nothing about its grade.
"""

from datamodules.controlled_task.grammar import Kind, build_tokenizer, grade
from datamodules.controlled_task.pairs import Gap, demonstrations, preference_pairs, prompts

__all__ = ["Gap", "Kind", "build_tokenizer", "demonstrations", "grade", "preference_pairs", "prompts"]
