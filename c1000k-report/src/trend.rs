//! Whether the last connections were opened as fast as the first ones.

use c1000k_record::RampPoint;

use crate::cost::float;

/// Fewer points are not enough for ten rates.
const POINTS_MIN: usize = 10;

/// The rate over each tenth of the connections, per second.
///
/// `None` where the ramp was too short to be seen in tenths.
#[must_use]
pub fn tenths(ramp: &[RampPoint]) -> Option<[f64; 10]> {
    let total = ramp.iter().map(|point| point.established).max()?;
    if ramp.len() < POINTS_MIN || total < 10 {
        return None;
    }
    let share = float(total) / 10.0;
    let mut rates = [0.0; 10];
    let mut began = 0.0;
    for (rate, tenth) in rates.iter_mut().zip(1_u32..) {
        let ended = reached_at(ramp, share * f64::from(tenth))?;
        *rate = share / (ended - began);
        // Points of one moment give no rate.
        if !rate.is_finite() || *rate <= 0.0 {
            return None;
        }
        began = ended;
    }
    Some(rates)
}

/// The median rate of the last three tenths over that of the first three.
#[must_use]
pub fn ratio(tenths: &[f64; 10]) -> f64 {
    let [a, b, c, .., x, y, z] = *tenths;
    median(x, y, z) / median(a, b, c)
}

fn median(a: f64, b: f64, c: f64) -> f64 {
    a.min(b).max(a.max(b).min(c))
}

/// When this many connections stood, on the straight line between two points.
fn reached_at(ramp: &[RampPoint], connections: f64) -> Option<f64> {
    let (mut seconds, mut established) = (0.0, 0.0);
    for point in ramp {
        if float(point.established) >= connections {
            let step = float(point.established) - established;
            let share = if step > 0.0 { (connections - established) / step } else { 1.0 };
            return Some(seconds + share * (point.seconds - seconds));
        }
        (seconds, established) = (point.seconds, float(point.established));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp(rate: impl Fn(u32) -> u64) -> Vec<RampPoint> {
        let mut established = 0;
        (1..=100)
            .map(|second| {
                established += rate(second);
                RampPoint { seconds: f64::from(second), established, ..RampPoint::default() }
            })
            .collect()
    }

    #[test]
    fn an_even_ramp_has_no_trend() {
        let tenths = tenths(&ramp(|_| 1_000)).unwrap();
        assert!(tenths.iter().all(|rate| (rate - 1_000.0).abs() < 1e-6), "{tenths:?}");
        assert!((ratio(&tenths) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn a_ramp_that_slows_down_has_a_trend() {
        let slowing = ramp(|second| if second <= 50 { 2_000 } else { 1_000 });
        assert!((ratio(&tenths(&slowing).unwrap()) - 0.5).abs() < 1e-6);
    }

    #[test]
    fn one_stall_does_not_make_a_trend() {
        let stalled = ramp(|second| if second == 97 { 1 } else { 1_000 });
        assert!((ratio(&tenths(&stalled).unwrap()) - 1.0).abs() < 0.02);
    }

    #[test]
    fn too_few_points_give_no_trend() {
        assert_eq!(tenths(&[]), None);
        assert_eq!(tenths(&ramp(|_| 1_000)[..9]), None);
        assert_eq!(tenths(&ramp(|_| 0)), None);
        let frozen = vec![RampPoint { established: 100, ..RampPoint::default() }; 20];
        assert_eq!(tenths(&frozen), None);
    }
}
