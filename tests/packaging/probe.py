"""Import each module named on the command line; print, as JSON, which fail and why.

Runs in environments that hold the package under test and nothing of the test suite.
"""

import importlib
import json
import sys

failures: dict[str, str] = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        failures[name] = error.name or repr(error)
    except Exception as error:
        failures[name] = repr(error)
print(json.dumps(failures))
