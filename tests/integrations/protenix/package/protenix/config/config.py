from ml_collections import ConfigDict


def parse_configs(configs, arg_str=None, fill_required_with_null=False):
    return ConfigDict(configs)
