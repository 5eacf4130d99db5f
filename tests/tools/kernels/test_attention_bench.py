"""attention_bench measures what it says: the runtime's attention, on caches that differ in nothing but their dtype."""

import json

from typer.testing import CliRunner

from kimi_lite.native.latent_rows import ROW_FORMS, row_bytes
from kimi_lite.tools.kernels.attention_bench import HEADS, KV_LORA, ROPE, app


def test_a_table_and_json_of_every_dtype() -> None:
    done = CliRunner().invoke(app, ["--depth", "640", "--threads", "1", "--repeats", "1"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout.splitlines()[-1])
    results = document["results"]
    assert set(results) == set(ROW_FORMS)
    for dtype, result in results.items():
        num_bytes, flops = 640 * row_bytes(dtype, KV_LORA + ROPE), 2 * HEADS * 640 * (2 * KV_LORA + ROPE)
        assert abs(result["gb_s"] * result["seconds"] * 1e9 / num_bytes - 1) < 1e-6
        assert abs(result["gflop_s"] * result["seconds"] * 1e9 / flops - 1) < 1e-6
    errors = {dtype: result["error"] for dtype, result in results.items()}
    assert errors["f32"] == 0 < errors["f16"] < errors["bf16"] < errors["q8"] < 0.02
