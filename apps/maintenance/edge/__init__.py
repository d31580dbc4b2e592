"""The agent of an edge box: it forecasts offline, queues what it finds and takes signed models."""
