"""Images in conversations: read once, seen once, in their places, whatever is undone, repeated or loaded again."""

import base64
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kimi_lite.engine import loader
from kimi_lite.engine.answer_settings import AnswerSettings
from kimi_lite.engine.documents import load_document, to_document
from kimi_lite.engine.session import Session
from kimi_lite.engine.vision import Vision, marked_ids, without_marks
from kimi_lite.errors import KimiLiteError
from kimi_lite.media.features import FeatureStore
from kimi_lite.options import Options
from tests.engine.fakes import fake_engine, fake_vision, scripted_logits
from tests.media.pictures import Image, encoded, write_video
from tests.tiny import write_tiny_gguf


def grey(level: int, width: int = 56, height: int = 28) -> dict:
    """An image part: (width / 28) x (height / 28) tokens, and the fake tower sees its level."""
    data = encoded(Image.new("RGB", (width, height), (level,) * 3))
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def seeing_session(vision: Vision | None = None, **more: object) -> Session:
    """It answers "fine" to everything."""
    engine = fake_engine(vision=vision or fake_vision(), **more)
    engine.model.next_logits = scripted_logits(engine.tokenizer, lambda prompt: ("", "fine"))
    return Session(engine, settings=AnswerSettings(is_thinking=False))


def prompts_of(session: Session) -> list[list[int]]:
    """What the model read of each prompt, by looking into the cache: features in the place of ids."""
    read = []
    next_logits = session.engine.model.next_logits

    def look(context: list[int]) -> np.ndarray:
        read.append(context)
        return next_logits(context)

    session.engine.model.next_logits = look
    return read


def ask(session: Session, *parts: dict):
    return list(session.ask(list(parts)))[-1].stats


def shown_in(context: list[int], session: Session) -> list[int]:
    """The runs between media_begin's content and media_end: what was seen there."""
    special = session.engine.tokenizer.special
    content, end = special["<|media_content|>"], special["<|media_end|>"]
    seen, start = [], 0
    while content in context[start:]:
        start = context.index(content, start) + 1
        stop = context.index(end, start)
        seen += [(context[start], stop - start)]
        assert len(set(context[start:stop])) == 1
        start = stop
    return seen


def test_images_between_texts_and_across_turns_stand_in_their_places() -> None:
    session = seeing_session()
    read = prompts_of(session)
    ask(session, text("first"), grey(10), text("and"), grey(20, 84, 56))
    assert shown_in(read[0], session) == [(10, 2), (20, 6)]
    ask(session, text("a third"), grey(30), text("?"))
    assert shown_in(read[-1], session) == [(10, 2), (20, 6), (30, 2)]
    assert session.engine.vision.num_encoded == 3


def test_equal_prompts_with_other_images_are_other_prompts() -> None:
    """The same ids, and the whole page before the image shared."""
    session = seeing_session(num_pages=40)
    words = "w" * 100
    first = ask(session, text(words), grey(10), text("what is it?"))
    session.undo()
    second = ask(session, text(words), grey(11), text("what is it?"))
    assert first.prompt_tokens == second.prompt_tokens
    assert 100 < second.cached_tokens < second.prompt_tokens - 12
    session.undo()
    assert ask(session, text(words), grey(10), text("what is it?")).cached_tokens == first.prompt_tokens - 1


def test_a_repeated_image_is_seen_once_whatever_is_undone_or_asked_again() -> None:
    session = seeing_session()
    read = prompts_of(session)
    ask(session, text("look"), grey(10), grey(10))
    list(session.regenerate())
    session.undo()
    ask(session, grey(10), text("look again"))
    session.turns = []
    ask(session, grey(10))
    assert shown_in(read[-1], session) == [(10, 2)]
    assert session.engine.vision.num_encoded == 1
    assert session.engine.counters()["images_seen"] == 1


def test_an_image_is_decoded_once_however_often_its_tokens_are_counted() -> None:
    session = seeing_session()
    reader, read = session.engine.vision.reader, []
    decode = reader.read
    reader.read = lambda source, report: read.append(source.kind) or decode(source, report)
    content = [text("look"), grey(10), grey(20)]
    for _ in range(3):
        session.count_tokens(content)
    ask(session, *content)
    session.count_tokens()
    assert read == ["image", "image"]


def test_a_video_that_was_written_again_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    session = seeing_session()
    counts = []
    for number in (4, 40):
        write_video(path, number, 10)
        counts.append(session.count_tokens([{"type": "video_url", "video_url": {"url": path.as_uri()}}]))
    assert counts[0] < counts[1]


def test_a_follow_up_prefills_only_what_is_new() -> None:
    session = seeing_session()
    first = ask(session, text("look"), grey(10), text("well?"))
    second = ask(session, text("and now?"))
    assert second.cached_tokens == first.prompt_tokens + first.generated_tokens - 1


def test_a_saved_conversation_is_found_in_the_cache_again() -> None:
    session = seeing_session()
    first = ask(session, text("look"), grey(10), text("well?"))
    document = to_document(session)
    session.clear()
    load_document(session, document, "it")
    second = ask(session, text("and now?"))
    assert second.cached_tokens == first.prompt_tokens + first.generated_tokens - 1
    assert session.engine.vision.num_encoded == 1


def test_tokens_are_counted_with_images() -> None:
    session = seeing_session()
    content = [text("look"), grey(10, 280, 280)]
    counted = session.count_tokens(content)
    assert ask(session, *content).prompt_tokens == counted
    assert counted > 100
    assert session.count_tokens([text("look"), grey(10, 28, 28)]) < session.count_tokens() + 40


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_seen() -> None:
    session = seeing_session(context_length=128)
    with pytest.raises(KimiLiteError, match="need a context of"):
        ask(session, grey(10, 28 * 20, 28 * 10))
    assert session.engine.vision.num_encoded == 0
    assert session.turns == []


def test_a_video_is_a_run_of_chunks_with_time_stamps(tmp_path: Path) -> None:
    path = write_video(tmp_path / "film.mp4", 40, 10)
    session = seeing_session()
    read, told = prompts_of(session), []
    session.on_media = lambda what, done, total: told.append((what, done, total))
    ask(session, text("film"), {"type": "video_url", "video_url": {"url": path.as_uri()}}, text("end"))
    said = session.engine.tokenizer.decode([i for i in read[0] if i < 300])
    assert "film00:00:00.000<|media_begin|>video<|media_content|>" in said
    assert "<|media_end|>00:00:02.200<|media_begin|>video<|media_content|>" in said
    assert [number for _, number in shown_in(read[0], session)] == [6, 6]
    assert told[0] == ("reading film.mp4", 0, 40)
    assert [each for each in told if each[0].startswith("looking")] == [
        ("looking (1 of 2)", 0, 1),
        ("looking (2 of 2)", 0, 1),
    ]


def test_cancelled_while_images_are_seen_the_answer_is_cancelled() -> None:
    session = seeing_session()
    encode = session.engine.vision.tower.encode

    def cancelling(patches, report, should_stop):
        if patches.pixels.max() == 20:
            session.cancel()
        return encode(patches, report, should_stop)

    session.engine.vision.tower.encode = cancelling
    tokens = list(session.ask([grey(10), grey(20), grey(30)]))
    assert tokens[-1].finish_reason == "cancelled"
    assert session.engine.vision.num_encoded == 1
    assert [turn.role for turn in session.turns] == ["user"]


def test_without_a_tower_a_sentence_says_what_to_download() -> None:
    session = Session(fake_engine(), settings=AnswerSettings(is_thinking=False))
    with pytest.raises(KimiLiteError, match="1 image, and fake has no vision tower here") as caught:
        ask(session, grey(10))
    assert "--mmproj" in caught.value.hint
    assert session.turns == []


@pytest.mark.parametrize("named", [{"images": ("a.png",)}, {"videos": ("a.mp4",)}])
def test_images_for_a_model_without_a_tower_are_refused_before_its_weights_are_read(
    named: dict[str, tuple[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0))
    monkeypatch.setattr(loader, "_open_model", None)
    with pytest.raises(KimiLiteError, match="need a vision tower"):
        loader.load(path, Options(context_length=256, num_threads=1, **named))


def test_marks_are_the_vocabulary_s_ids_to_the_model() -> None:
    session = seeing_session()
    requests = []
    generate = session.engine.generate
    session.engine.generate = lambda many, report: (requests.extend(many), generate(many, report))[1]
    ask(session, grey(10), text("x"), grey(20))
    request, pad = requests[0], session.engine.template.pad_id
    assert [request.prompt_ids[image.position : image.end] for image in request.images] == [(pad, pad)] * 2
    marked = marked_ids(request)
    assert without_marks(marked, pad) == request.prompt_ids
    assert marked == session.known_ids[: len(marked)]


def test_features_outlive_the_process_and_damaged_files_are_not_believed(tmp_path: Path) -> None:
    def see() -> int:
        session = seeing_session(fake_vision(tmp_path))
        ask(session, grey(10), grey(20))
        return session.engine.vision.num_encoded

    assert [see(), see()] == [2, 0]
    first, second = sorted(tmp_path.glob("*/*.features"))
    first.write_bytes(first.read_bytes()[:-1])
    data = bytearray(second.read_bytes())
    data[-3] ^= 1
    second.write_bytes(data)
    assert [see(), see()] == [2, 0]
    first.write_bytes(second.read_bytes())  # another image's
    assert see() == 1


_KILLED = """
import numpy as np, sys
from pathlib import Path
from kimi_lite.media.features import FeatureStore
store = FeatureStore(1000, Path(sys.argv[1]), "tower", 1 << 30)
print("ready", flush=True)
for number in range(1000):
    store.put(number.to_bytes(16), np.full((500, 1000), number, np.float32))
"""


def test_after_kill_9_every_file_is_whole(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", _KILLED, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    while not list(tmp_path.glob("tower/*.features")):
        assert child.poll() is None
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    store = FeatureStore(1000, tmp_path, "tower", 1 << 30)
    found = [int(path.stem, 16) for path in tmp_path.glob("tower/*.features")]
    for number in found:
        assert (store.get(number.to_bytes(16), 500) == number).all()
    assert found


def test_memory_and_disk_stay_within_their_limits(tmp_path: Path) -> None:
    one = 4 * 10 * 100
    store = FeatureStore(100, tmp_path, "tower", max_bytes=5 * (one + 24), max_memory_bytes=3 * one)
    for number in range(9):
        store.put(bytes([number]) * 16, np.full((10, 100), number, np.float32))
    assert len(list(tmp_path.glob("*/*.features"))) == 5
    assert store.get(bytes([0]) * 16, 10) is None
    assert (store.get(bytes([8]) * 16, 10) == 8).all()
    assert sum(each.nbytes for each in store._kept.values()) <= 3 * one
