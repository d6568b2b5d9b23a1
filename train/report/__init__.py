"""The alignment report: how much more alike the small LM and the target have become, and how sure that is."""
