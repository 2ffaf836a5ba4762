inference_configs = {"input_json_path": None}
