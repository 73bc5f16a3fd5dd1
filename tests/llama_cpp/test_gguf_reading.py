"""What a file says of itself, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from starquant.errors import CheckpointError
from starquant.llama_cpp.reading import describe_gguf, exported_gguf
from starquant.llama_cpp.writing import write_gguf
from starquant.models import load_tokenizer
from starquant.quantized.install import install
from starquant.testbed.tiny.shipped import weights_folder
from tests.support.llama import bits_of_blocks, block_model, write

gguf = pytest.importorskip("gguf")


def test_ours_name_their_method_and_others_do_not(tmp_path: Path) -> None:
    model, path = block_model("llada_mha"), tmp_path / "m.gguf"
    install(model, bits_of_blocks("q4_0", "llada_mha"), packed=True)
    made_by = {"method": "gptq", "bits": "q4_0", "record": "0123456789abcdef"}
    write_gguf(model, load_tokenizer(weights_folder(0)), path, "F16", made_by)
    described = describe_gguf(path)
    assert (described.architecture, described.file_type, described.method) == ("llada", "q4_0", "gptq")
    assert exported_gguf(path) == "0123456789abcdef"
    assert described.types == {"Q4_0": 15, "Q8_0": 1, "F32": 5}
    assert described.bits.weights.block == "q4_0"
    assert described.tensors["blk.0.ffn_up.weight"] == ("Q4_0", (160, 96))
    widths = {entry.role: entry.weight_bits for entry in described.manifest()}
    assert (widths["ffn_down"], widths["output"], widths["token_embd"]) == (4, 8, 4)
    plain = describe_gguf(write(block_model("dream_gqa"), tmp_path / "plain.gguf", "F16"))
    assert (plain.file_type, plain.method, plain.record, plain.bits.full_precision) == ("f16", "llama_cpp", None, True)


@pytest.mark.parametrize(
    ("made_by", "error"),
    [
        (
            {"method": "x/../../../../evil", "record": "0"},
            r"starquant\.method: got 'x/.*evil', allowed: at most 48",
        ),
        ({"method": "a\nb", "record": "0"}, r"starquant\.method: got 'a\\nb', allowed: at most 48"),
        ({"method": "rtn", "record": "../0"}, r"starquant\.record: got '\.\./0', allowed: at most 48"),
        ({"record": "0"}, r"starquant\.method: got nothing, allowed: a name, beside starquant\.bits"),
        ({"method": "rtn"}, r"starquant\.record: got nothing, allowed: a name, beside starquant\.bits"),
    ],
)
def test_a_maker_that_is_no_name_is_refused(made_by: dict[str, str], error: str, tmp_path: Path) -> None:
    """The maker's name becomes part of a record's file name."""
    path = tmp_path / "m.gguf"
    write_gguf(block_model("llada_mha"), load_tokenizer(weights_folder(0)), path, "F16", {"bits": "f16"} | made_by)
    with pytest.raises(CheckpointError, match=rf"^.*m\.gguf: {error}[^\n]*$"):
        describe_gguf(path)
    assert exported_gguf(path) is None


def test_a_type_that_is_no_number_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llada")
    writer.add_array("general.file_type", [1])
    for write_part in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_ti_data_to_file):
        write_part()
    writer.close()
    with pytest.raises(CheckpointError, match=r"m\.gguf: is of file type \[1\], allowed: f32, f16"):
        describe_gguf(tmp_path / "m.gguf")


def test_files_that_are_cut_or_of_another_architecture_are_refused(tmp_path: Path) -> None:
    path = write(block_model("llada_mha"), tmp_path / "m.gguf")
    cut, other = tmp_path / "cut.gguf", tmp_path / "other.gguf"
    cut.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"cut\.gguf: is no whole GGUF"):
        describe_gguf(cut)
    assert exported_gguf(cut) is None
    writer = gguf.GGUFWriter(other, "llama")
    writer.add_file_type(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"other\.gguf: is of architecture 'llama', allowed: llada, dream"):
        describe_gguf(other)
