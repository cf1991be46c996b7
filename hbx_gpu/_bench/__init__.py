"""`hbx-gpu bench`: how fast a machine loads an atlas or archive, checked while it is measured.

Every figure comes with the limit that memory and link of the same machine allow, measured in the same
process, and with what was checked. `runs.run` measures, `report` writes, `command` is the command line.
"""
