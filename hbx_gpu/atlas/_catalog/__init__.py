"""The LanceDB catalog of an atlas: tables, records, registries, snapshots and the write journal."""
