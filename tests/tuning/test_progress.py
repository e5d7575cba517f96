"""Progress: shown in a notebook or in a terminal."""

import sys
from types import SimpleNamespace

from falcon_kit.tuning.progress import in_notebook


def test_outside_of_a_notebook_there_is_no_cell():
    assert not in_notebook()


def test_a_cell_of_colab_whose_shell_has_another_name_is_one_too(monkeypatch):
    kernel = type("ZMQInteractiveShell", (), {})
    shell = type("Shell", (kernel,), {})()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", SimpleNamespace(ZMQInteractiveShell=kernel))
    assert in_notebook()
