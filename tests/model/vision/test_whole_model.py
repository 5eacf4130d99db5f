"""The whole model with its tower beside transformers: images between texts and a video in one prompt, through the
engine, alone and with others."""

import base64
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kimi_lite.engine.engine import Engine
from kimi_lite.engine.loader import load
from kimi_lite.engine.types import Request, SamplingParams
from kimi_lite.engine.vision import MarkedPrompt, encode_prompt, placed, without_marks
from kimi_lite.options import Options
from kimi_lite.quantize.convert import convert
from kimi_lite.quantize.mmproj import write_mmproj
from tests.checkpoints import make_checkpoint
from tests.media.pictures import encoded, pixels, write_video
from tests.model.runner import relative_error

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", reason="the test extra brings transformers")
pytest.importorskip("transformers.models.kimi_k25", reason="this version of transformers has no Kimi K2.5")

IMAGE_ID, VIDEO_ID = 3, 4  # only for transformers: rows of the embedding that features replace
NUM_ANSWER_TOKENS = 6
OPTIONS = Options(context_length=1024, num_threads=2, kv_dtype="f32", num_sequences=4)
_VISION = {"hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 144, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def oracle(folder: Path):
    """transformers' model with the text weights of a random Kimi checkpoint; both are converted to files."""
    from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25Config
    from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25ForConditionalGeneration

    text = make_checkpoint(folder / "text", "kimi", num_layers=2, dtype="float32")
    convert(folder / "text", folder / "model.gguf", "f32")
    config = Kimi_K25Config(
        text_config=text.config.to_dict(),
        vision_config=_VISION | {"pos_emb_height": 8, "pos_emb_width": 8},
        projection_hidden_size=_VISION["hidden_size"],
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        tie_word_embeddings=False,
    )
    model = Kimi_K25ForConditionalGeneration(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        is_gain = "norm" in name and name.endswith("weight")
        scale = weight[0].numel() ** -0.5 if weight.ndim > 1 and "pos_emb" not in name else 0.1
        weight.copy_(is_gain + scale * torch.randn(weight.shape, generator=generator))
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    for module in model.model.language_model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = text.config.rms_norm_eps
    model.save_pretrained(folder / "vision")
    write_mmproj(folder / "vision", folder / "mmproj-model.gguf", "f32")
    return model


@pytest.fixture(scope="module")
def engine(oracle: object, folder: Path) -> Iterator[Engine]:
    with load(folder / "model.gguf", OPTIONS) as engine:  # the tower is found next to it
        yield engine


def image(width: int, height: int, seed: int) -> dict:
    url = "data:image/png;base64," + base64.b64encode(encoded(pixels(width, height, seed))).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


@pytest.fixture(scope="module")
def conversations(folder: Path) -> dict[str, list[dict]]:
    film = write_video(folder / "film.mp4", 30, 10)  # 6 frames: chunks of 4 and 2
    video = {"type": "video_url", "video_url": {"url": film.as_uri()}}
    return {
        "images between texts": [text("a "), image(100, 50, 0), text(" b "), image(30, 200, 1), image(28, 28, 2)],
        "a video and an image": [text("see "), video, text(" and "), image(140, 90, 3), text(" now")],
        "text": [text("nothing to see here")],
    }


def prompt_of(engine: Engine, parts: list[dict]) -> MarkedPrompt:
    return encode_prompt(engine.template, engine.vision, [{"role": "user", "content": parts}])


def request_of(engine: Engine, name: str, parts: list[dict]) -> Request:
    prompt = prompt_of(engine, parts)
    sampling = SamplingParams(temperature=0, max_tokens=NUM_ANSWER_TOKENS, ignore_eos=True)
    images = placed(prompt.ids, prompt.items, engine.vision.see(prompt.items))
    return Request(name, without_marks(prompt.ids, engine.template.pad_id), sampling, images=images)


def reference_logits(model, prompt: MarkedPrompt, answer: list[int]) -> np.ndarray:
    """Of transformers at the prompt's end and after every token of the answer."""
    ids, images, chunks = [], [], []
    items = iter(prompt.items)
    last = None
    for i in [*prompt.ids, *answer]:
        if i < 0:
            if last is None or last[1] == 0:
                item = next(items).item
                last = [item, item.patches.grid.num_tokens()]
                (chunks if item.stamp else images).append(item.patches)
            last[1] -= 1
            ids.append(VIDEO_ID if last[0].stamp else IMAGE_ID)
        else:
            ids.append(i)
    shown: dict = {}
    image_names, video_names = ("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")
    for names, patches in ((image_names, images), (video_names, chunks)):
        if patches:
            values = np.concatenate([(each.pixels.astype(np.float32) / 255 - 0.5) / 0.5 for each in patches])
            shown |= {names[0]: torch.from_numpy(values), names[1]: torch.tensor([list(each.grid) for each in patches])}
    logits = model(input_ids=torch.tensor([ids]), **shown).logits[0].numpy()
    return logits[len(prompt.ids) - 1 : len(ids) - 1]


def answered(engine: Engine, requests: list[Request]) -> tuple[dict[str, list[int]], list[np.ndarray]]:
    """Ids by request, and the logits of every step."""
    forward, seen = engine.model.forward, []

    def watched(batch, should_stop=None):
        seen.append(forward(batch, should_stop).copy())
        return seen[-1]

    engine.model.forward = watched
    ids: dict[str, list[int]] = {}
    for token in engine.generate(requests):
        ids.setdefault(token.request_id, []).extend([] if token.id is None else [token.id])
    engine.model.forward = forward
    return ids, seen


@pytest.mark.parametrize("name", ["images between texts", "a video and an image"])
def test_logits_equal_transformers(name: str, engine: Engine, oracle: object, conversations: dict) -> None:
    request = request_of(engine, name, conversations[name])
    ids, logits = answered(engine, [request])
    want = reference_logits(oracle, prompt_of(engine, conversations[name]), ids[name])
    have = np.concatenate([rows for rows in logits if len(rows)])
    assert have.shape == want.shape == (NUM_ANSWER_TOKENS, want.shape[1])
    assert relative_error(have, want) < 1e-4
    blind, _ = answered(engine, [Request(f"{name}, blind", request.prompt_ids, request.sampling)])
    assert blind[f"{name}, blind"] != ids[name]  # what is shown matters


def test_alone_and_with_others_the_tokens_are_the_same(engine: Engine, conversations: dict, folder: Path) -> None:
    alone = {}
    for name, parts in conversations.items():
        ids, _ = answered(engine, [request_of(engine, f"{name}, alone", parts)])
        alone[name] = ids[f"{name}, alone"]
    with load(folder / "model.gguf", OPTIONS) as other:  # nothing is cached
        together, _ = answered(other, [request_of(other, name, parts) for name, parts in conversations.items()])
    assert together == alone
