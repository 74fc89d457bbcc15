//! Time series with a bounded number of points.
//!
//! When a series is full, every second point is removed, and from then on half as many are kept. So it covers a run of
//! any length evenly, at a bounded size.

use std::mem;
use std::time::Duration;

/// The maximum number of points of a series.
pub const POINTS_MAX: usize = 3_600;

/// The time until the next point, by the time since the start: a run of half a second gets as many points as one of ten
/// seconds, and a long one at most one per second.
///
/// ```
/// use c1000k_record::series::step;
/// use std::time::Duration;
///
/// assert_eq!(step(Duration::ZERO), Duration::from_millis(20));
/// assert_eq!(step(Duration::from_secs(5)), Duration::from_millis(100));
/// assert_eq!(step(Duration::from_secs(600)), Duration::from_secs(1));
/// ```
#[must_use]
pub fn step(elapsed: Duration) -> Duration {
    (elapsed / 50).clamp(Duration::from_millis(20), Duration::from_secs(1))
}

/// Points at equal intervals, or at shorter ones at first, of which at most [`POINTS_MAX`] are kept.
///
/// ```
/// use c1000k_record::Series;
///
/// let mut series = Series::new();
/// for second in 0..1_000_000 {
///     series.push(second);
/// }
/// let points = series.into_points();
/// assert!(points.len() <= c1000k_record::series::POINTS_MAX);
/// assert_eq!(points.last(), Some(&999_999));
/// ```
#[derive(Debug, Clone)]
pub struct Series<T> {
    points: Vec<T>,
    /// The newest point, if it is not one of those kept.
    newest: Option<T>,
    offered: u64,
    /// One of `stride` points is kept.
    stride: u64,
}

impl<T> Default for Series<T> {
    fn default() -> Self {
        Self { points: Vec::new(), newest: None, offered: 0, stride: 1 }
    }
}

impl<T> Series<T> {
    /// An empty series; it allocates as it grows.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the next point. The first and the newest one are always kept.
    pub fn push(&mut self, point: T) {
        let is_kept = self.offered.is_multiple_of(self.stride);
        self.offered += 1;
        if !is_kept {
            self.newest = Some(point);
            return;
        }
        self.newest = None;
        self.points.push(point);
        // One place is reserved for the newest point.
        if self.points.len() == POINTS_MAX {
            self.thin_out();
        }
    }

    /// The points in order.
    #[must_use]
    pub fn into_points(mut self) -> Vec<T> {
        self.points.extend(self.newest);
        self.points
    }

    fn thin_out(&mut self) {
        self.stride *= 2;
        let mut is_kept = false;
        // POINTS_MAX is even, so the last point is one of those removed: it is kept as the newest.
        self.newest = self.points.pop();
        let points = mem::take(&mut self.points);
        self.points = points
            .into_iter()
            .filter(|_| {
                is_kept = !is_kept;
                is_kept
            })
            .collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series_of(count: usize) -> Vec<usize> {
        let mut series = Series::new();
        for point in 0..count {
            series.push(point);
        }
        series.into_points()
    }

    #[test]
    fn a_short_series_keeps_every_point() {
        assert_eq!(series_of(0), Vec::<usize>::new());
        assert_eq!(series_of(5), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn any_length_stays_bounded_even_and_ends_with_the_newest_point() {
        for count in
            [1, POINTS_MAX - 1, POINTS_MAX, POINTS_MAX + 1, 2 * POINTS_MAX - 1, 2 * POINTS_MAX]
                .into_iter()
                .chain((10_000..60_000).step_by(997))
        {
            let points = series_of(count);
            assert!(points.len() <= POINTS_MAX, "{count}: {}", points.len());
            assert!(points.len() >= count.min(POINTS_MAX / 2), "{count}: {}", points.len());
            assert_eq!(points.first(), Some(&0));
            assert_eq!(points.last(), Some(&(count - 1)));
            let stride = points.get(1).map_or(1, |second| second - points[0]);
            let evenly = &points[..points.len() - 1];
            assert!(evenly.windows(2).all(|pair| pair[1] - pair[0] == stride), "{count}");
        }
    }
}
