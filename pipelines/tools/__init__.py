"""Commands about one run, one machine or one key: nothing that Ray is asked to do."""
