"""Operations on whole artifacts: convert, remerge, combine, diff, export."""
