"""evaluate.py for tests that start the command in their own process, which saves the seconds of its imports."""

import importlib.util
import sys

from runs import ROOT

spec = importlib.util.spec_from_file_location("evaluate_command", ROOT / "evaluate.py")
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
Args, main = module.Args, module.main
