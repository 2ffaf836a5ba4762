model_configs = {"protenix_base_default_v1.0.0": {"model": {"N_cycle": 4}}}
