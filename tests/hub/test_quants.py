"""Names of repositories, quants and files as publishers and people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_lite.errors import KimiLiteError
from kimi_lite.hub.names import HubName, is_hub_name, looks_like_hub_name, parse_hub_name
from kimi_lite.hub.quants import CHECKPOINT, RemoteFile, find_quant, find_tower, group, label_of


def files(*paths: str, num_bytes: int = 10) -> list[RemoteFile]:
    return [RemoteFile(path, num_bytes + number, f"{number:040x}") for number, path in enumerate(paths)]


def split(stem: str, count: int) -> list[str]:
    return [f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hf:unsloth/Kimi-K2.5-GGUF:UD-TQ1_0", HubName("unsloth/Kimi-K2.5-GGUF", "UD-TQ1_0")),
        ("unsloth/Kimi-K2.5-GGUF", HubName("unsloth/Kimi-K2.5-GGUF")),
        ("hf.co/unsloth/Kimi-K2.5-GGUF:Q4_K_M", HubName("unsloth/Kimi-K2.5-GGUF", "Q4_K_M")),
        ("huggingface.co/a/b", HubName("a/b")),
        ("https://huggingface.co/a/b", HubName("a/b")),
        ("https://huggingface.co/a/b/", HubName("a/b")),
        ("https://hf-mirror.example/a/b/tree/main/UD-Q2_K_XL", HubName("a/b", "UD-Q2_K_XL")),
        ("https://huggingface.co/a/b/blob/v2/x/m-00001-of-00002.gguf", HubName("a/b", "x/m-00001-of-00002.gguf", "v2")),
        ("https://huggingface.co/a/b/resolve/main/m.gguf?download=true", HubName("a/b", "m.gguf")),
        ("hf:a/b@refs/pr/3:IQ1_M", HubName("a/b", "IQ1_M", "refs/pr/3")),
    ],
)
def test_names_are_read_as_people_write_them(text, name):
    assert parse_hub_name(text) == name
    assert parse_hub_name(name.flag) == parse_hub_name(str(name)) == name


@pytest.mark.parametrize(
    "text",
    ["", "hf:", "hf:kimi", "a/b/c", "../b:Q4", "a/..", "a/b:../../x", "a/b:x//y", "hf:a b/c", "a/b@..:x", "hf:a/b:",
     "https://huggingface.co/", "https://huggingface.co/a/b/discussions/3", ".a/b", "a/-b"],
)  # fmt: skip
def test_what_is_no_name_is_refused(text):
    with pytest.raises(KimiLiteError, match=r"is no (name|address) of a model on a hub"):
        parse_hub_name(text)


@given(st.text(max_size=40))
def test_any_text_is_a_name_or_a_sentence(text):
    is_hub_name(text)
    looks_like_hub_name(text)
    try:
        name = parse_hub_name(text)
    except KimiLiteError:
        return
    assert parse_hub_name(str(name)) == name and ".." not in name.repository.split("/")


def test_paths_are_not_names():
    assert not any(map(is_hub_name, ("model.gguf", "/m/a.gguf", "a/b", "./a/b", "C:\\m\\a.gguf", "kimi-k2.5")))
    assert looks_like_hub_name("unsloth/Kimi-K2.5-GGUF") and looks_like_hub_name("a/b:Q4_K_M")
    assert not any(map(looks_like_hub_name, ("models/kimi.gguf", "models/kimi", "/m/kimi-gguf", "a/b/c:Q4")))


LABELS = {
    "Kimi-K2.5-Q4_K_M": "Q4_K_M",
    "UD-Q2_K_XL/Kimi-K2.5-UD-Q2_K_XL": "UD-Q2_K_XL",
    "UD-TQ1_0/Kimi-K2.5-UD-TQ1_0": "UD-TQ1_0",
    "kimi-k2.5-tq1_0": "tq1_0",
    "smol-IQ1_KT/Kimi-K2-Instruct-smol-IQ1_KT": "smol-IQ1_KT",
    "IQ2_KL/Kimi-K2.5-IQ2_KL": "IQ2_KL",
    "Q4_X/Kimi-K2.6-Q4_X": "Q4_X",
    "BF16/Kimi-K2.5-BF16": "BF16",
    "model.i1-IQ1_M": "i1-IQ1_M",
    "moonlight-16b-a3b-instruct.Q8_0": "Q8_0",
    "Kimi-K2.5-MXFP4_MOE": "MXFP4_MOE",
    "Qwen3-Q1-test-IQ3_XXS": "IQ3_XXS",
    "DeepSeek-V2-Lite-F16": "F16",
    "Kimi-K2.5-PQ2_0": "PQ2_0",
    "kimi-k2.5": "kimi-k2.5",
    "Q8_0/model": "Q8_0",
    "Step-APEX-I-Compact": "Step-APEX-I-Compact",
}


@pytest.mark.parametrize(("stem", "label"), LABELS.items())
def test_a_quant_is_called_by_its_type(stem, label):
    assert label_of(stem) == label


def test_files_are_grouped_into_models():
    paths = [
        *reversed(split("UD-TQ1_0/K-UD-TQ1_0", 3)),
        *split("Q4_K_M/K-Q4_K_M", 5)[:3],  # the publisher is still uploading
        "K-IQ1_M.gguf", "mmproj-F16.gguf", "imatrix_unsloth.gguf_file", "K.imatrix.gguf", "README.md", "config.json",
    ]  # fmt: skip
    quants = {quant.label: quant for quant in group(files(*paths))}
    assert set(quants) == {"UD-TQ1_0", "Q4_K_M", "IQ1_M"}
    assert [file.path for file in quants["UD-TQ1_0"].files] == split("UD-TQ1_0/K-UD-TQ1_0", 3)
    assert quants["UD-TQ1_0"].is_whole and not quants["Q4_K_M"].is_whole
    with pytest.raises(KimiLiteError, match=r"Q4_K_M has 5 shards, and the repository holds 3 of them \(1, 2, 3\)"):
        quants["Q4_K_M"].require_whole()


def test_a_checkpoint_is_a_model_of_its_own():
    paths = [
        *("config.json", "model-1-of-2.safetensors", "model-2-of-2.safetensors", "model.safetensors.index.json"),
        *("tiktoken.model", "modeling_deepseek.py", "figures/a.png", "README.md", "original/x.safetensors"),
    ]
    (quant,) = group(files(*paths))
    assert quant.label == CHECKPOINT and quant.is_whole
    assert {file.path for file in quant.files} == set(paths[:5])


@given(st.data())
def test_a_label_finds_its_quant_in_any_case_and_by_its_files(data):
    every = st.lists(st.sampled_from(sorted(LABELS)), unique_by=lambda stem: LABELS[stem].lower(), min_size=1)
    paths, stems = [], data.draw(every)
    for stem in stems:
        count = data.draw(st.integers(1, 3))
        paths += split(stem, count) if count > 1 else [f"{stem}.gguf"]
    quants = group(files(*paths))
    assert len(quants) == len(stems)
    wanted = data.draw(st.sampled_from(quants))
    for text in (wanted.label, wanted.label.upper(), wanted.label.lower(), wanted.files[0].path, wanted.files[0].name):
        assert find_quant(quants, text, "a/b") is wanted


def test_what_is_not_one_quant_is_answered_with_the_list():
    quants = group(files(*(f"K-{label}.gguf" for label in ("Q4_K_M", "UD-Q4_K_XL", "UD-Q2_K_XL", "Q2_K", "UD-TQ1_0"))))
    assert find_quant(quants, "tq1_0", "a/b").label == "UD-TQ1_0"  # one alone can be meant
    assert find_quant(quants, "Q2_K", "a/b").label == "Q2_K"
    for wanted in ("", "Q4_K", "Q4", "UD", "Q5_K_M", "K"):
        with pytest.raises(KimiLiteError) as caught:
            find_quant(quants, wanted, "a/b")
        assert all(quant.label in caught.value.hint for quant in quants) and "kimi-lite pull a/b" in caught.value.hint
    both = group(files("x/K-UD-IQ1_M.gguf", "x/K-smol-IQ1_M.gguf", "y/L-Q8_0.gguf", "z/M-Q8_0.gguf"))
    with pytest.raises(KimiLiteError, match="IQ1_M names 2 models"):
        find_quant(both, "IQ1_M", "a/b")
    assert find_quant(both, "y/L-Q8_0", "a/b").files[0].path == "y/L-Q8_0.gguf"
    assert find_quant(both, "y", "a/b").files[0].path == "y/L-Q8_0.gguf"
    with pytest.raises(KimiLiteError, match="holds no GGUF file"):
        find_quant((), "Q4", "a/b")


def test_the_tower_of_a_model_is_in_its_folder_or_above():
    listed = files(
        "UD-Q4/K-UD-Q4_K.gguf", "mmproj-BF16.gguf", "mmproj-F16.gguf", "mmproj-F32.gguf", "other/mmproj-F16.gguf"
    )
    (quant,) = group(listed)
    assert find_tower(listed, quant).path == "mmproj-F16.gguf"
    assert find_tower(files("UD-Q4/K-UD-Q4_K.gguf", "UD-Q4/K-mmproj-q8_0.gguf", "mmproj-F16.gguf"), quant).path == (
        "UD-Q4/K-mmproj-q8_0.gguf"
    )
    assert find_tower(files("UD-Q4/K-UD-Q4_K.gguf", "other/mmproj-F16.gguf"), quant) is None
