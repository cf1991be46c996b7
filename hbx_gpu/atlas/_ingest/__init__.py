"""From files and objects in memory to datasets of an atlas."""
