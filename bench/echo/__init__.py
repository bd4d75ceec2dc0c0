"""`cascade bench echo`: the service beside the echo, which is what Kafka itself costs, at several rates in one run."""
