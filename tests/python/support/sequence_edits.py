"""Edits of sequence 0 beside sequence 1, after which its state is still one that can be loaded."""

from __future__ import annotations

from collections.abc import Callable

from support.llama_reference import Context, llama


def remove_the_beginning(context: Context) -> None:
    context.seq_rm(0, 0, 9)


def remove_from_the_middle(context: Context) -> None:
    context.seq_rm(0, 50, 59)


def remove_the_end(context: Context) -> None:
    context.seq_rm(0, 60, -1)


def shift(context: Context) -> None:
    context.seq_rm(0, 0, 9)
    context.seq_add(0, 9, -1, -9)


def shift_a_part(context: Context) -> None:
    context.seq_add(0, 55, -1, 100)


def divide(context: Context) -> None:
    llama.llama_memory_seq_div(context.memory, 0, 5, -1, 3)


def copy_a_part(context: Context) -> None:
    if context.options.kv_unified:
        context.seq_cp(1, 0, -1, 12)


def copy_over(context: Context) -> None:
    context.seq_rm(0)
    context.seq_cp(1, 0)


def keep(context: Context) -> None:
    context.seq_keep(0)


def decode_others(context: Context) -> None:
    """Until a sliding window has lost cells to them."""
    for _ in range(4):
        context.decode_in_turn([1, 2], 20, seed=3)


EDITS: list[Callable[[Context], None]] = [
    remove_the_beginning,
    remove_from_the_middle,
    remove_the_end,
    shift,
    shift_a_part,
    divide,
    copy_a_part,
    copy_over,
    keep,
    decode_others,
]


def can_edit(edit: Callable[[Context], None], kind: str) -> bool:
    """Whether llama.cpp survives this edit of a kind of model."""
    return kind != "qwen2vl" or edit not in (shift, shift_a_part, divide)
