"""A trainer of nnU-Net v2 that distils a plain nnU-Net of many channels into one of a few."""

try:
    from privdistill.integrations.nnunet.export import write_student_folder
    from privdistill.integrations.nnunet.trainer import nnUNetTrainerDistillation
except ImportError as error:
    from privdistill.integrations.batch import needs

    raise ImportError(needs("nnunet", error)) from error

__all__ = ["nnUNetTrainerDistillation", "write_student_folder"]
