// The scores of an item. A cell is {candidate, criterion}, both from 0.

export class Sheet {
  /** `scores`: {candidate ID: {criterion: score}}, as the server takes them. */
  constructor(item, criteria, scores) {
    this.candidates = item.candidates.map((candidate) => candidate.id);
    this.criteria = criteria;
    this.scores = structuredClone(scores ?? {});
  }

  of({ candidate, criterion }) {
    return this.scores[this.candidates[candidate]]?.[this.criteria[criterion]];
  }

  set({ candidate, criterion }, score) {
    const id = this.candidates[candidate];
    this.scores[id] = { ...this.scores[id], [this.criteria[criterion]]: score };
  }

  /** Returns all cells, candidate after candidate. */
  cells() {
    return this.candidates.flatMap((_, candidate) =>
      this.criteria.map((_, criterion) => ({ candidate, criterion })),
    );
  }

  /** Returns the cells without a score. */
  empty() {
    return this.cells().filter((cell) => this.of(cell) === undefined);
  }

  /** Returns the first cell of a candidate without a score, or its first cell. */
  firstOf(candidate) {
    return this.empty().find((cell) => cell.candidate === candidate) ?? { candidate, criterion: 0 };
  }

  /** Returns the cell after this one; after the last one, the first without a score, if any. */
  after({ candidate, criterion }) {
    const cells = this.cells();
    const index = candidate * this.criteria.length + criterion + 1;
    return index < cells.length ? cells[index] : this.empty()[0];
  }

  /** Returns the cell so many candidates and criteria away, or at the border. */
  near({ candidate, criterion }, candidates, criteria) {
    const clamp = (value, length) => Math.min(length - 1, Math.max(0, value));
    return {
      candidate: clamp(candidate + candidates, this.candidates.length),
      criterion: clamp(criterion + criteria, this.criteria.length),
    };
  }
}

export const same = (a, b) => a.candidate === b.candidate && a.criterion === b.criterion;
