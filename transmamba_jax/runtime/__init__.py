"""The machine below the model: processes, devices to serve on, files of tensors, memory of the host."""
