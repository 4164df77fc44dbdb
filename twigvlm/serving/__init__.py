"""A model that answers many: one worker owns the device, who asks waits in a queue."""
