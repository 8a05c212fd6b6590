"""The meaning of the columns of a report's tables."""

# Explanations of the columns of all tables. In `summary`, columns that fold seeds are means.
COLUMNS = {
    "id": "identifier of the configuration and its seed; runs with equal ids are the same run",
    "setting": "method and the keys in which this configuration differs from the others, without "
    "the seed",
    "full_setting": "setting in full, where its name is too long for a table",
    "method": "distillation method; MISALIGNED: the student was trained, on purpose, on the "
    "teacher's outputs for other images",
    "student": "student architecture with its size",
    "data": "data set",
    "seed": "seed of everything random in the student's run",
    "status": "planned, running, done, failed, diverged, pruned or killed",
    "reason": "why the run is not done, or which of its files is damaged; damaged results are not "
    "counted",
    "overrides": "configuration overrides of this run",
    "epochs": "number of training epochs of the student",
    "samples": "training images per epoch",
    "test_samples": "number of test images",
    "batch_size": "images per step",
    "budget": "epochs x training images; must be equal in rows that are compared",
    "shares_budget": "whether the row has the budget of its baseline; without a baseline, the most "
    "common budget for its student and data set",
    "n": "number of seeds that are done",
    "planned": "number of planned seeds; n < planned: the mean covers fewer seeds than planned",
    "teachers": "number of teacher seeds among them, if there are several",
    "teacher_seed": "seed of the teacher's training; empty without a teacher",
    "split_seed": "seed that chooses the validation images",
    "test_accuracy": "fraction of test images classified correctly after the last epoch, 0 to 1",
    "test_accuracy_std": "standard deviation of test_accuracy over seeds (n - 1)",
    "test_accuracy_ci95": "half-width of the 95 % confidence interval of the mean test_accuracy "
    "over seeds (Student's t); empty for n = 1 and for unstable settings",
    "test_accuracy_low": "lower end of that interval, on the scale of logits, which keeps it "
    "within 0 and 1",
    "test_accuracy_high": "upper end of that interval",
    "test_accuracy_median": "median of test_accuracy over seeds",
    "test_accuracy_images_ci95": "half-width of the 95 % confidence interval of test_accuracy for "
    "new images, with these seeds",
    "test_nll": "mean negative log-likelihood of the test labels, nats",
    "test_brier": "Brier score on test images: mean squared distance of the probabilities from the "
    "label, 0 to 2",
    "test_ece": "expected calibration error on test images, 15 equal-width bins, 0 to 1",
    "test_ece_floor": "the expected calibration error of a perfectly calibrated network, due to "
    "the finite number of test images",
    "test_agreement": "fraction of test images on which student and teacher predict the same class",
    "test_teacher_kl": "mean KL(teacher || student) on test images, nats",
    "val_accuracy": "like test_accuracy, on images held out of training; all choices are based on "
    "it; likewise val_*",
    "params": "number of parameters of the network that is deployed",
    "macs": "multiply-accumulate operations of that network per image",
    "method_params": "number of additional parameters that only the method needed",
    "train_seconds": "wall-clock time of the student's training, seconds",
    "images_per_second": "training images per second",
    "teacher": "teacher architecture",
    "teacher_params": "number of parameters of the teacher",
    "teacher_macs": "multiply-accumulate operations of the teacher per image",
    "teacher_test_accuracy": "accuracy of the teacher on the same test images",
    "lr": "learning rate of the last step of the epoch",
    "accuracy": "fraction of the epoch's training views classified correctly, in train mode",
    "loss": "training loss: the weighted sum of the method's terms, each of which has its own "
    "column (hard, soft, ...)",
    "seconds": "wall-clock time of the epoch, seconds",
    "chosen": "whether the setting is the best of its method by the objective on validation "
    "images, for this student and data set; only complete settings are chosen, and of settings "
    "that tie the one planned first",
    "tied_with": "the chosen setting, planned earlier, that has the same objective as this one",
    "settings_tried": "number of settings of the method that it was chosen among",
    "choice_seeds": "seeds on which these were compared",
    "choice_value": "mean of the objective over those seeds",
    "complete": "whether every planned seed is done",
    "last_below_best": "validation accuracy of the best epoch minus that of the last, 0 to 1",
    "train_flops": "floating-point operations of the student's training: 6 for each "
    "multiply-accumulate operation of a forward pass",
    "teacher_flops": "floating-point operations of the teacher during that training, without those "
    "that its cache saved",
    "seeds": "number of seeds on which the row is compared with its baseline (`standard`, same "
    "student and data set)",
    "difference": "mean of the test accuracy minus the baseline's over those seeds",
    "difference_ci95": "half-width of its 95 % confidence interval; the intervals of all chosen "
    "rows of one student, data set and budget hold together (Dunnett, or Welch with Holm where "
    "spreads differ)",
    "difference_ci90": "half-width of the row's own 90 % interval, which decides on equality",
    "difference_error": "standard error of the difference",
    "difference_df": "degrees of freedom of that error",
    "difference_images_ci95": "half-width of the 95 % confidence interval of the difference for "
    "new images, with these seeds",
    "p": "p-value of the difference, corrected for all rows that are compared together",
    "decision": "better or worse: the interval excludes 0; equal: the 90 % interval lies within "
    "the margin; undecided; unstable: a seed diverged or collapsed; too few: fewer than 3 seeds",
    "unit": "what the claim is about: seeds (with this teacher), or teachers",
    "family": "number of settings whose claims have one error rate of 5 % together",
    "seed_correlation": "mean correlation of two settings of the family over the seeds",
    "unstable": "number of seeds that diverged, or fell far below the setting's median",
    "verdict": "the decision in words",
    "epoch": "number of epochs done",
    "folder": "directory of the run's files",
}
COLUMNS |= {
    f"{name}_ci95": f"half-width of the 95 % confidence interval of the mean {name} over seeds"
    for name in ("test_nll", "test_brier", "test_ece", "test_agreement", "test_teacher_kl")
}
