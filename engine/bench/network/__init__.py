"""`jupiter bench network`: stages in network namespaces of one machine, over shaped links."""
