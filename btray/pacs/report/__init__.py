"""Answers back into a PACS: structured reports (TID 1500) and heat maps, made of answers and of their sources there.

answer = StudyAnswer.of_decisions(collector.decisions(), reader, sources=..., model_id=..., classified_at=...)
if answer is not None:
    Reporter(DicomWeb(root, access), manifest, classifier, heat_maps=3).report(answer)  # "sent" or "there"
"""
