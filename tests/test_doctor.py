"""`vlm-lora doctor`: what it names, what it finds wrong, and the run that it tries.

Run: pytest tests/test_doctor.py
"""

import pytest

from vlm_lora.cli import doctor, main


def told(capsys, *flags: str) -> tuple[int, str]:
    code = main(["doctor", *flags])
    return code, capsys.readouterr().out


def test_it_names_versions_device_format_cache_and_what_is_optional(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_LORA_CACHE", str(tmp_path / "not yet there"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code, out = told(capsys, "--no-test")
    assert code == 0
    for start in ("vlm-lora:   0.", "packages:   torch 2.", "device:     ", "dtype:      ", "cache:      "):
        assert f"\n{start}" in f"\n{out}"
    assert f"{tmp_path}/not yet there: features of 0 images" in out
    assert "optional:   flash-linear-attention" in out
    assert out.endswith("No problem found.\n")
    assert "hf_secret" not in out
    assert not (tmp_path / "not yet there").exists()


def test_the_run_that_it_tries_learns(capsys):
    code = main(["doctor"])
    out, err = capsys.readouterr()
    assert err == "", "the run itself is silent"
    assert "trained, saved, loaded; 8 of 8 colours named" in out
    assert code == 0


def test_what_is_wrong_is_a_problem_and_exit_code_1(capsys, monkeypatch):
    versions = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "5.0.0" if name == "transformers" else versions(name))
    monkeypatch.setattr(doctor, "_names_colours", lambda place: 3)
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    code, out = told(capsys)
    assert code == 1
    assert "problem:    transformers is 5.0.0; expected " in out
    assert "problem:    after training the model names 3 of 8 colours, expected all." in out
    assert "cannot be written. Set VLM_LORA_CACHE" in out
    assert out.endswith("Problems: 3.\n")


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: no kernel image"), OSError("disk full")])
def test_a_run_that_fails_is_told_of_in_a_line(error, capsys, monkeypatch):
    def fail(place):
        raise error

    monkeypatch.setattr(doctor, "_names_colours", fail)
    code, out = told(capsys)
    assert code == 1
    assert f"problem:    the test run failed: {type(error).__name__}: {error}" in out
