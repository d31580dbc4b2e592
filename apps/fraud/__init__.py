"""Streaming transaction fraud scoring: Kafka in, one decision or dead letter per message out."""
