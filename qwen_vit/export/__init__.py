"""Export many images to a folder of shards. A later run can resume an interrupted export."""
