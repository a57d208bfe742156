"""Run the benchmark in tokenization.py: `python benchmarks/tokenize.py [--quick]`.

Python has a module of this name, which other scripts of this folder load without knowing; they get Python's own.
"""

import sys

if __name__ == "__main__":
    folder = sys.path.pop(0)
    import runpy

    runpy.run_path(f"{folder}/tokenization.py", run_name="__main__")
else:
    import importlib.util
    import sysconfig

    spec = importlib.util.spec_from_file_location("tokenize", sysconfig.get_path("stdlib") + "/tokenize.py")
    sys.modules[__name__] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
