data_configs = {}
