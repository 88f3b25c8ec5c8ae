"""Train the demo's judge of captions from scratch: `python -m demo.judge_captions`.

It answers both calls of `masters.rewards.judge_prompts`, as `demo.judge` does for short answers. Before its verdict it
takes a text apart: layout, then color and shape of both things, each beside the reference's. References are
the caption task's labels; what is right is `demo.wordings.describes`. It learns on scenes of the pool that the task's
models are trained on; scores are on scenes of the test pool.
"""

from dataclasses import replace

import numpy as np

from demo.judge import Lesson, Maker, Recipe, main
from demo.wordings import captions_of, read, telling
from masters.data.sources.captions import COLORS, QUESTION, RELATIONS, SHAPES, Scene, Thing, pools
from masters.rewards.verdict import Triple

RECIPE = Recipe(steps=1200, rows=3, packed=8, learning_rate=2e-3, looked_at=24)
NO_CAPTION = "it is no caption."


class CaptionMaker(Maker):
    """Makes triples about captions of a pool's scenes."""

    def __init__(self, rng: np.random.Generator, pool: str = "teacher") -> None:
        super().__init__(rng, made_up=0.0)
        self.scenes = pools()[pool]
        self.kinds = {
            "same": (0.25, lambda _, r: self.caption(r)),
            "changed": (0.3, lambda _, r: self.wrong(r)),
            "exchanged": (0.2, lambda _, r: self.exchanged(scene_of(r))),
            "sloppy": (0.05, lambda _, r: self.with_slip(self.caption(r), tells=False)),
            "broken": (0.1, lambda _, r: self.with_slip(self.caption(r), tells=True)),
            "empty": (0.02, lambda q, r: self.pick(["", " ", ".", "\n", "..."])),
            "gibberish": (0.04, lambda q, r: self.gibberish(q)),
            "forged": (0.04, lambda q, r: self.forged(r)),
        }

    @classmethod
    def unseen_lessons(cls, rng: np.random.Generator, count: int) -> dict[str, list[Lesson]]:
        maker = cls(rng, "test")
        sets = {kind: [maker.lesson(maker.triple(kind)) for _ in range(count)] for kind in maker.kinds}
        return sets | {"second_call": [maker.second_lesson(maker.triple()) for _ in range(count)]}

    def texts(self) -> list[str]:
        said = [part for t in (self.triple() for _ in range(1500)) for part in (t.text, self.explanation(t))]
        return [QUESTION, *said]

    def question(self) -> tuple[str, str]:
        return QUESTION, self.pick(self.scenes).caption

    def explanation(self, triple: Triple) -> str:
        scene = read(triple.text)
        return compared(scene, scene_of(triple.reference)) if scene else f"{NO_CAPTION} <answer>0</answer>"

    def caption(self, reference: str) -> str:
        return self.pick(captions_of(scene_of(reference)))

    def wrong(self, reference: str) -> str:
        """Describe a scene in which layout, colors and shapes are each changed in a share of cases."""
        scene, share = scene_of(reference), self.pick([0.2, 0.5, 0.8])
        layout, *values = (
            self.pick(options) if self.rng.random() < share else value
            for value, options in (
                (scene.layout, list(RELATIONS)), (scene.first.color, list(COLORS)), (scene.first.shape, SHAPES),
                (scene.second.color, list(COLORS)), (scene.second.shape, SHAPES),
            )
        )  # fmt: skip
        return self.pick(captions_of(Scene(layout, Thing(*values[:2]), Thing(*values[2:]))))

    def exchanged(self, scene: Scene) -> str:
        """Describe a scene whose two things have exchanged place, color or shape."""
        a, b = scene.first, scene.second
        recolored = Thing(b.color, a.shape), Thing(a.color, b.shape)
        first, second = self.pick([(b, a), recolored, recolored[::-1]])
        return self.pick(captions_of(replace(scene, first=first, second=second)))

    def with_slip(self, caption: str, tells: bool) -> str:
        """Drop, double or replace a word: one with meaning if `tells`, else one without."""
        words = caption.split()
        at = self.pick([at for at, word in enumerate(words) if bool(telling(word)) == tells])
        other = self.pick([*COLORS, *SHAPES, "left", "above"]) if tells else self.pick(["a", "the", "of", "is"])
        return " ".join(words[:at] + self.pick([[], [words[at]] * 2, [other]]) + words[at + 1 :])


def compared(told: Scene, reference: Scene) -> str:
    """Return the judge's explanation of a text that describes a scene."""
    things = [
        f"{beside(one.color, other.color)} {beside(one.shape, other.shape)}"
        for one, other in ((told.first, reference.first), (told.second, reference.second))
    ]
    verdict = f"<answer>{int(told == reference)}</answer>"
    return f"{beside(told.layout, reference.layout)}, {', '.join(things)}. {verdict}"


def beside(told: str, reference: str) -> str:
    return f"{told} {reference} {'same' if told == reference else 'other'}"


def scene_of(label: str) -> Scene:
    """Return the scene of a label, which can always be read."""
    scene = read(label)
    assert scene is not None, label
    return scene


if __name__ == "__main__":
    main("captions-judge", CaptionMaker, RECIPE, __doc__)
