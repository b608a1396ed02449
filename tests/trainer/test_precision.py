"""bf16 where the hardware does not compute it: asked for, it is refused; left to `auto`, it is not chosen."""

from __future__ import annotations

import pytest
import torch

from launcher.errors import UserError
from launcher.trainer.engines import choose_precision

GPU = torch.device("cuda", 0)


@pytest.fixture
def old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")


@pytest.mark.usefixtures("old_gpu")
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "fp32"), ("auto", "bf16"), ("bf16", "bf16")])
def test_bf16_on_a_gpu_that_only_emulates_it_is_refused_with_what_would_work(precision: str, dtype: str):
    with pytest.raises(
        UserError, match=r"= bf16: expected a GPU with native bf16 .* this one is Tesla T4\. Use .*fp16"
    ):
        choose_precision(precision, dtype, GPU)


@pytest.mark.usefixtures("old_gpu")
def test_auto_and_fp16_are_left_alone_there():
    assert choose_precision("auto", "fp32", GPU).compute == torch.float32
    assert choose_precision("fp16", "fp32", GPU).compute == torch.float16


def test_bf16_on_a_gpu_that_computes_it_is_what_auto_takes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert choose_precision("auto", "fp32", GPU).compute == torch.bfloat16
