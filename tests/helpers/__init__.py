"""What several test files share: options of the configuration, small trainings, made-up results, a made-up hub."""
