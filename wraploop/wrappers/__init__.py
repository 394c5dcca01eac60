"""Execution: wrappers, each of which runs a module elsewhere and changes nothing else.

Where a batch goes: `wrapper.py` (the contract), then `lane_runner.py` for shards in threads or on
devices, `rank_runner.py` for shards in processes, `local_runner.py` for rows that processes have
anyway. The algebra is in `border.py`.
"""
