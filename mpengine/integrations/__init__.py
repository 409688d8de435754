"""What trainers need beyond the plain objects. Each module needs its trainer's package; `import mpengine` needs none.

- `mpengine.integrations.lightning`: precision plugins for Lightning's `Trainer` and `Fabric`
- `mpengine.integrations.accelerate`: an `Accelerator`
- `mpengine.integrations.transformers`: a `Trainer`, and the mixin that makes one of any subclass of it
"""
