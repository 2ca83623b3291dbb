def run_native(arguments, note):
    raise NotImplementedError
