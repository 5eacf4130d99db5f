"""llama.cpp's flags in every command: rewritten, dropped with a line, or refused with what to use; never another
option."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from kimi_lite.cli import app
from kimi_lite.commandline import commands, llama_flags
from kimi_lite.commandline.flags import resolve
from kimi_lite.commandline.llama_flags import BY_NAME
from kimi_lite.errors import KimiLiteError
from kimi_lite.options import OPTIONS, Options, options_of

GROUP = typer.main.get_command(app)
NEEDED = {"quantize": ["src", "dst"], "imatrix": ["-m", "model", "-f", "text"], "pull": ["owner/repo"]}
NEEDED_LAST = {"launch": ["codex"]}
COMMANDS = {  # a group's default command is named like the group
    name: getattr(command, "commands", {}).get(name, command) for name, command in sorted(GROUP.commands.items())
}


@pytest.fixture(autouse=True, scope="module")
def said() -> Iterator[list[str]]:
    """The lines about flags without an effect."""
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "_say", lines.append)
        yield lines


def parse(command: str, *arguments: str) -> dict:
    """The parameters that typer finds, as in `kimi-lite COMMAND ARGUMENTS`."""
    line = [*NEEDED.get(command, []), *arguments, *NEEDED_LAST.get(command, [])]
    return COMMANDS[command].make_context(command, line).params


def attempt(command: str, *arguments: str) -> tuple[dict | None, Exception | None]:
    """The parameters, or what came instead: a sentence, help, or what the command's own flag cannot be."""
    try:
        return parse(command, *arguments), None
    except (KimiLiteError, typer.Exit, typer.BadParameter) as error:
        return None, error


def options(command: str, *arguments: str) -> Options:
    names = {option.name for option in options_of(command)}
    return resolve(command, {name: value for name, value in parse(command, *arguments).items() if name in names})


def own_flags(command: str) -> set[str]:
    return {flag for each in COMMANDS[command].params for flag in (*each.opts, *each.secondary_opts)}


@settings(deadline=None)
@given(
    st.sampled_from(sorted(COMMANDS)),
    st.sampled_from(sorted(BY_NAME)),
    st.sampled_from(["0", "1", "99", "on", "q8_0", "f16", "none", "some-text", "0.5"]),
    st.booleans(),
)
def test_every_flag_in_every_command_is_accepted_or_refused_by_name(command, name, value, is_joined):
    assume(name not in own_flags(command))
    takes_value = BY_NAME[name].value == "one"
    written = ([f"{name}={value}"] if is_joined else [name, value]) if takes_value else [name]
    plain = parse(command)
    found, error = attempt(command, *written)
    if error:
        assert name in error.message if isinstance(error, KimiLiteError) else "--ctx" in error.param.opts
        return
    changed = {key for key in plain if plain[key] != found[key]}
    assert len(changed) <= 1, (written, changed)  # what it means, and no other option


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_the_prompt_stays_the_prompt(name):
    """A value is not taken for the prompt, nor the prompt for a value."""
    if name in own_flags("run"):
        pytest.skip("ours, too")
    written = [name, "1"] if BY_NAME[name].value == "one" else [name]
    found, error = attempt("run", *written, "tell me")
    assert name in error.message if error else found["prompt"] == "tell me"


@settings(deadline=None)
@given(st.sampled_from(sorted(COMMANDS)), st.from_regex(r"-[A-Za-z]{2,7}", fullmatch=True))
def test_letters_after_one_dash_are_no_cluster_of_values(command, word):
    assume(word not in BY_NAME and word not in own_flags(command))
    switches = [each for each in COMMANDS[command].params if each.param_type_name == "option" and each.is_flag]
    _, error = attempt(command, word)
    if isinstance(error, KimiLiteError):
        assert word in error.message
    else:
        letters = {f"-{letter}" for letter in word[1:]}
        assert letters <= {"-h", *(flag for each in switches for flag in each.opts)}


@pytest.mark.parametrize(
    ("written", "field", "expected"),
    [
        ("-ctk q8_0", "kv_dtype", "q8"),
        ("-ctv bf16", "kv_dtype", "bf16"),
        ("--cache-type-k=f16", "kv_dtype", "f16"),
        ("--mlock", "loading", "lock"),
        ("--mlock --no-mmap", "loading", "lock"),
        ("--no-mmap --mlock", "loading", "lock"),
        ("--no-mmap", "loading", "read"),
        ("--mmap", "loading", "map"),
        ("--ctx-size 4096", "context_length", 4096),
        ("-c4096", "context_length", 4096),
        ("--predict 7", "max_tokens", 7),
        ("--n-predict -1", "max_tokens", None),
        ("--predict -2", "max_tokens", None),
        ("--temperature 0.5", "temperature", 0.5),
        ("--system-prompt be-short", "system", "be-short"),
        ("-ngl 0", "device", "cpu"),
        ("-ngl 99", "device", None),
        ("-mg 1", "device", "cuda:1"),
        ("-dev CUDA1", "device", "cuda:1"),
        ("-dev none", "device", "cpu"),
        ("-cmoe", "num_gpu_experts", 0),
        ("--reasoning-budget 0", "is_thinking", False),
        ("--reasoning-budget 200", "thinking_budget", 200),
        ("--simple-io", "is_plain", True),
        ("-fa on --top-k 7", "top_k", 7),
        ("-fa --top-k 7", "top_k", 7),
        ("--numa distribute", "numa", "auto"),
        ("--numa=numactl", "numa", "auto"),
        ("--numa off", "numa", "off"),
    ],
)
@pytest.mark.parametrize("command", ["chat", "run"])
def test_equivalents_work(command, written, field, expected):
    assert getattr(options(command, *written.split()), field) == expected


def test_a_system_prompt_in_a_file(tmp_path):
    (tmp_path / "system.txt").write_text("be kind")
    assert options("run", "-sysf", str(tmp_path / "system.txt")).system == "be kind"


@pytest.mark.parametrize(
    ("command", "written", "hint"),
    [
        ("run", "-hff Kimi.gguf", "-m hf:OWNER/REPO:QUANT"),
        ("run", "-hft hf_x", "HF_TOKEN"),
        ("run", "-ctk q4_0", "--kv-dtype takes"),
        ("run", "-cnv", "kimi-lite chat"),
        ("chat", "-st", "kimi-lite run"),
        ("chat", "-no-cnv", "kimi-lite run"),
        ("run", "-s 42", "--seed 42"),
        ("run", "-ts 1,1", "--device cuda:0,cuda:1"),
        ("run", "-ctx 4096", "--ctx"),
        ("run", "--numa isolate", "numactl -N 0 -m 0"),
        ("quantize", "--pure", "--type"),
    ],
)
def test_refusals_name_what_to_use(command, written, hint):
    with pytest.raises(KimiLiteError) as caught:
        parse(command, *written.split())
    assert hint in caught.value.hint and written.split()[0] in caught.value.message


def test_one_line_says_what_has_no_effect(said):
    said.clear()
    parse("run", "-ngl", "99", "-fa", "on", "hi")
    assert [line.partition(" has no")[0] for line in said] == ["llama.cpp's -ngl", "llama.cpp's -fa"]
    said.clear()
    parse("run", "-q", "-ngl", "99", "hi")
    assert not said


def test_the_table_names_options_that_exist():
    named = set(re.findall(r"--[a-z][a-z-]+", Path(llama_flags.__file__).read_text())) - set(BY_NAME)
    every = set().union(*(own_flags(command) for command in COMMANDS))
    assert named - every <= {"--single-turn", "--conversation", "--help", "--local-dir"}
    assert len(BY_NAME) == sum(len(flag.names) for flag in llama_flags.FLAGS)  # none twice


def test_commands_of_other_programs_name_ours():
    runner = CliRunner()
    for name in ("list", "ps", "show", "rm", "server", "download"):
        done = runner.invoke(app, [name])
        assert isinstance(done.exception, KimiLiteError) and done.exception.hint
    assert runner.invoke(app, []).exit_code == runner.invoke(app, ["help"]).exit_code == 0
    assert "Commands" in runner.invoke(app, []).stdout
    assert runner.invoke(app, ["version"]).stdout.startswith("kimi-lite ")
    assert "--kv-dtype" in runner.invoke(app, ["help", "run"]).stdout


def test_every_option_has_a_flag_and_help():
    for option in OPTIONS.values():
        assert option.help.endswith("."), option.name


def test_a_model_of_a_hub_is_named_as_llama_cpp_names_it():
    for flag in ("-hf", "-hfr", "--hf-repo"):
        assert options("chat", flag, "unsloth/Kimi-K2.5-GGUF:UD-TQ1_0").model == "hf:unsloth/Kimi-K2.5-GGUF:UD-TQ1_0"
    assert options("serve", "--offline", "-hf", "a/b").is_offline


CARDS = [  # command lines as model cards and threads have them, with our names in place of llama.cpp's
    "-ngl 99 -ot .ffn_.*_exps.=CPU --jinja -c 16384 --temp 1.0 --min-p 0.01 -fa on -ctk q8_0",
    "--n-gpu-layers 99 -ot blk.*.ffn_(up|down)_exps.=CPU,blk.*.ffn_gate_exps.=CPU --threads -1 --ctx-size 16384",
    "--fit on --threads -1 --seed -1 --temp 0.6 --top-p 0.95 --special --prio 3",
    "-fit off -fitt 1024 -fitc 4096 -t 2 --no-warmup -kvo --no-host",
    "-cmoe -ngl 999 -t -1 --reasoning off --reasoning-format auto",
]


@pytest.mark.parametrize("line", CARDS)
@pytest.mark.parametrize("command", ["chat", "run", "serve"])
def test_command_lines_of_model_cards_are_taken(command: str, line: str, said: list[str]) -> None:
    found = options(command, *line.split())
    assert found.num_threads in (None, 2)
    assert found.seed is None


def test_experts_on_the_cpu_is_where_they_are_and_other_overrides_are_refused(said: list[str]) -> None:
    parse("chat", "-ot", "exps=CPU")
    assert "-ot exps=CPU has no effect" in said[-1]
    for rules in ("exps=CUDA0", "attn=CPU", "exps=CPU,attn=CPU", "exps"):
        assert "-ot is not an option" in str(attempt("chat", "-ot", rules)[1])


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("run", "swarm", "launch", "pull")])
@pytest.mark.parametrize("word", ["x.gguf", "/m/Kimi K2.gguf", "kimi-k2.5", "hello"])
def test_arguments_without_a_place_are_answered_with_their_option(command: str, word: str) -> None:
    _, error = attempt(command, word)
    if command == "chat" and word == "hello":
        assert "kimi-lite run hello" in str(error)
    elif "--model" in own_flags(command) and word != "hello" and command != "imatrix":
        assert f"kimi-lite {command} -m {shlex.quote(word)}" in str(error)
    else:
        assert f"no place for {word!r}" in str(error)


def test_a_prompt_of_several_words_wants_quotes() -> None:
    assert "quotes" in str(attempt("run", "hello", "there")[1])
    assert "kimi-lite run -m x.gguf" in str(attempt("run", "x.gguf", "hello")[1])
