from tests.tools.interpreted import INTERPRETED

collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]
