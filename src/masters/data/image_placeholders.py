"""Image placeholders in questions: marks by which other projects say where a prompt has its image.

The chat template places the image before the question: there, a mark would be read as text or as a second image. Marks
are the placeholders of chat templates and of vLLM's model classes (LLaVA and InternVL `<image>`, Phi `<|image_1|>`,
Qwen-VL `<|vision_start|><|image_pad|><|vision_end|>`, DeepSeek `<image_placeholder>`, Pixtral `[IMG]`, Gemma
`<start_of_image>`, MiniCPM `(<image>./</image>)`, ...) and the numbered ones of data sets (MMMU `<image 1>`).

Images of HTML (`<img src=...>`) and of Markdown (`![...](...)`) are text: a question may be about them. HTML's `<img>`
counts as a mark only with a path or another mark before `</img>` (Qwen-VL, InternVL), or alone on a line.
"""

import re

_OPEN = r"(?:<\|?(?:vision_start|media_start|(?:begin|start)_of_image|image_start|img_start)\|?>|<im_start>)"
_CLOSE = r"(?:<\|?(?:vision_end|media_end|end_of_image|image_end|img_end)\|?>|<im_end>|</image>)"
_PAD = (
    r"(?:<\|?(?:image|img|vision|media)[_@-]?(?:pad|patch|token|soft_token|context)\|?>"
    r"|<im_patch>|\[img_(?:break|end)\])"
)
_BETWEEN = r"(?:\s|\./|image|<\|(?:patch|media_content|endoftext)\|>|<\|?image(?:@placeholder)?\|?>|" + _PAD + ")"
_NAME = r"(?:image|img)"
_NUMBER = r"[ _-]?(?P<{}>\d{{1,3}})"
_NAMED = rf"<\|?{_NAME}[ _@-]?(?:placeholder|here|content)\|?>"
_PATH = r"(?:[^<>\s]{1,1000}|[^<>\n]{1,1000}\.\w{3,4})"
_IMAGES = (  # each is one image
    rf"{_OPEN}{_BETWEEN}*?{_CLOSE}",
    r"\(?<image>\s*\./\s*</image>\)?",
    rf"<img>(?:{_PATH}|(?:<img_context>)*|<image>|{_NAMED})</img>",
    r"(?m:^)[^\S\n]*<img>[^\S\n]*(?m:$)",
    rf"{_PAD}(?:\s*{_PAD})*",
    _NAMED,
    rf"<\|?image\|?>|<\|img\|>|<\|?{_NAME}{_NUMBER.format('in_angles')}\|?>",
    rf"\[{_NAME}(?:{_NUMBER.format('in_brackets')})?\](?!\()",  # before "(" it is a link's text
    _OPEN,
)
_MARK = re.compile(rf"(?P<image>{'|'.join(_IMAGES)})|{_CLOSE}", re.IGNORECASE)


def remove_placeholders(question: str) -> tuple[str, int]:
    """Return a question without its placeholders, and the number of different images that they stand for.

    A question without marks is unchanged.
    """
    numbers: set[str] = set()
    text, end, unnumbered = "", 0, 0
    for mark in _MARK.finditer(question):
        if number := mark["in_angles"] or mark["in_brackets"]:
            numbers.add(number)
        elif mark["image"]:
            unnumbered += 1
        text = _join(text, question[end : mark.start()]) if end else question[: mark.start()]
        end = mark.end()
    cleaned = _join(text, question[end:]) if end else question
    return cleaned, len(numbers) + unnumbered


def _join(before: str, after: str) -> str:
    """Join what stood around a mark: by a line feed where the white space around it had one, else by a space."""
    left, right = before.rstrip(), after.lstrip()
    gap = before[len(left) :] + after[: len(after) - len(right)]
    if not left or not right:
        return left or right
    glued = left[-1].isalnum() and right[0].isalnum()
    return left + ("\n" if "\n" in gap else " " if gap or glued else "") + right
