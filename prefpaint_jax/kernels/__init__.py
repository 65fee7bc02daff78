"""Operations that are not plain XLA, chosen per platform."""
