"""Image placeholders of many formats are taken out of questions, and the images that they stand for are counted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from masters.data.image_placeholders import remove_placeholders

ONE_IMAGE = [
    "<image>", "<Image>", "<IMAGE>", "<img_1>", "<image_1>", "<image 1>", "<image1>", "<image-1>", "<|image|>",
    "<|image_1|>", "<|img|>", "<image_placeholder>", "<image-placeholder>", "<|image_placeholder|>", "[IMG]", "[image]",
    "[IMG_1]", "<ImageHere>", "<ImageContent>", "<image_soft_token>", "<start_of_image>", "<image_token>",
    "<|image_pad|>",
    "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>",
    "<|vision_start|>\n<|image_pad|>\n<|vision_end|>", "<img><IMG_CONTEXT><IMG_CONTEXT></img>",
    "<img>pictures/1.jpg</img>", "<img>my pictures/1.jpg</img>", "<img>https://example.org/1</img>", "<img></img>",
    "<Img><ImageHere></Img>", "<img><image></img>",
    "(<image>./</image>)", "<image>./</image>", "<im_start><im_patch><im_patch><im_end>",
    "<|image_start|><|patch|><|image_end|>",
    "<|begin_of_image|><|image|><|end_of_image|>", "<|begin_of_image|><|endoftext|><|end_of_image|>",
    "<start_of_image><image_soft_token><image_soft_token><end_of_image>", "<|imgpad|>", "<IMG_CONTEXT>",
    "<|media_start|>image<|media_content|><|media_pad|><|media_end|>",
    "<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>",
]  # fmt: skip
NO_MARKS = [
    "what is <b> here", "a < image > b", "<|im_start|>user", "<|im_end|>", "<imagine>", "images <of> x", "[imagine]",
    "<|video_pad|>", "x[image_index]", "<html>", " spaces \n stay ", "image 1", "(image)",
    # HTML and Markdown
    "What does the <img> tag do?", "<img> or <picture>?", "Which is right: <img>", "Where is </img> missing?",
    "What is between <img> and </img>?", '<img src="a.png">', "<img src='a.png' alt=x/>", "<IMG SRC=a.png>", "<img/>",
    '<image href="a.png"/>', "![](a.png)", "![a cat](images/1.png)", "![image](a.png)", "![img](a.png 'x')",
    "[image](a.png)", "[img 1](a.png)", "What renders\n<p><img></p>?",
]  # fmt: skip


@pytest.mark.parametrize("mark", ONE_IMAGE)
def test_one_mark_is_removed_with_the_space_around_it(mark: str) -> None:
    for text, expected in (
        (f"{mark}\nWhat color?", "What color?"),
        (f"{mark}What color?", "What color?"),
        (f"What color?\n {mark} \n", "What color?"),
        (f"Look at {mark} and say.", "Look at and say."),
        (f"First.\n{mark}\nSecond.", "First.\nSecond."),
        (f"What{mark}color?", "What color?"),
        (mark, ""),
    ):
        assert remove_placeholders(text) == (expected, 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<img>\nWhat color?", "What color?"), ("What color?\n  <img>\t\n", "What color?"), ("<img>", ""),
        ("First.\n<IMG>\nSecond.", "First.\nSecond."),
    ],
)  # fmt: skip
def test_img_is_a_mark_if_it_stands_alone_on_a_line(text: str, expected: str) -> None:
    assert remove_placeholders(text) == (expected, 1)


def test_html_and_markdown_stay_beside_a_mark() -> None:
    text = 'What does <img src="a.png"> show, and ![](b.png)?'
    assert remove_placeholders(f"<image>\n{text}") == (text, 1)


@pytest.mark.parametrize("text", NO_MARKS)
def test_other_text_is_unchanged(text: str) -> None:
    assert remove_placeholders(text) == (text, 0)


@pytest.mark.parametrize(
    ("text", "images"),
    [
        ("<image> and <image>", 2), ("<image 1> or <image 2>?", 2), ("<image 1>, again <image 1>?", 1),
        ("<|image_1|>\n<|image_2|>\n<|image_3|>", 3), ("<image><image>", 2), ("[IMG][IMG]", 2), ("<img>\n<img>", 2),
        ("<img>a.png</img><img>b.png</img>", 2), ("Look at [image]: what?", 1), ("Look![IMG]", 1),
        ("<|vision_start|><|image_pad|><|vision_end|>" * 2, 2), ("What? </image>", 0), ("What?<|vision_end|>", 0),
    ],
)  # fmt: skip
def test_different_images_are_counted(text: str, images: int) -> None:
    assert remove_placeholders(text)[1] == images


@given(st.text(alphabet="ab <>|\n?"))
def test_text_without_a_name_of_an_image_is_unchanged(text: str) -> None:
    assert remove_placeholders(text) == (text, 0)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "part",
    [
        " ",
        "<|vision_start|>",
        "<img>",
        "<img>a ",
        "<img> \n",
        "<img>.abc",
        "<image>",
        "(<image>./",
        "<image> ",
        "<|image_pad|> x",
    ],
)
def test_hostile_text_takes_linear_time(part: str) -> None:
    for _ in range(20):
        remove_placeholders(part * (20_000 // len(part)))
