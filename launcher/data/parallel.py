"""A share of a recipe's shards: what one of several machines does of `prepare`, beside the others and without locks.

Which shards there are follows from the data alone, so machine I of N takes those whose number modulo N is I. Each part
appears by one rename in the cache folder, which all machines share; `prepare` finds them there and only packs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from launcher.data.cache import cache_folder
from launcher.data.corpora import make_writable
from launcher.data.parts import Progress, tokenise_share
from launcher.data.prepare import corpora_of
from launcher.data.space import space_watched
from launcher.errors import UserError
from launcher.recipe.schema import Recipe

MOST = 1000  # shares; Slurm's default for the largest array is 1001


@dataclass(frozen=True, slots=True)
class Share:
    """Number `number` of `of` shares, from 0."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Share:
        """`I/N` as one writes it.

        Raises:
            UserError: it is no such share.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not int(match[1]) < int(match[2]) <= MOST:
            raise UserError(f"--shards {text}: expected I/N with I from 0 to N - 1, and N up to {MOST}, as 0/4.")
        return cls(int(match[1]), int(match[2]))


def prepare_share(recipe: Recipe, share: Share, progress: Progress) -> None:
    """Tokenise a share of the shards of every source, and nothing else.

    Raises:
        UserError: data, template or tokenizer cannot be learnt from as the recipe says; names file and record.
    """
    cache = cache_folder(recipe)
    make_writable(cache)
    jobs = {job.key: job for corpus in corpora_of(recipe) for job in corpus.jobs}
    with space_watched(cache):
        for job in jobs.values():
            tokenise_share(job, cache, progress, number=share.number, of=share.of)
