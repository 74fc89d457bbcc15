//! Counts, sizes and durations that users type.
//!
//! The parsers are for clap's `value_parser`; their errors name the fault and the accepted forms.

use std::time::Duration;

const NOT_A_NUMBER: &str = "is not a number";
const TOO_LARGE: &str = "is too large";
const UNKNOWN_UNIT: &str = "ends in an unknown unit";
const NEGATIVE_EXPONENT: &str = "has a negative exponent";

const COUNT_UNITS: &[(&str, u64)] = &[
    ("", 1),
    ("k", 1_000),
    ("K", 1_000),
    ("m", 1_000_000),
    ("M", 1_000_000),
    ("g", 1_000_000_000),
    ("G", 1_000_000_000),
];

const BYTE_UNITS: &[(&str, u64)] = &[
    ("", 1),
    ("B", 1),
    ("k", 1 << 10),
    ("K", 1 << 10),
    ("KiB", 1 << 10),
    ("kB", 1_000),
    ("KB", 1_000),
    ("m", 1 << 20),
    ("M", 1 << 20),
    ("MiB", 1 << 20),
    ("MB", 1_000_000),
    ("g", 1 << 30),
    ("G", 1 << 30),
    ("GiB", 1 << 30),
    ("GB", 1_000_000_000),
    ("t", 1 << 40),
    ("T", 1 << 40),
    ("TiB", 1 << 40),
    ("TB", 1_000_000_000_000),
];

/// Parses a count: `15000`, `1,000,000`, `1_000_000`, `10k`, `2.5M`, `1e6`.
///
/// # Errors
/// A sentence that names the fault and the accepted forms.
///
/// ```
/// use c1000k_host::quantity::parse_count;
/// assert_eq!(parse_count("10k"), Ok(10_000));
/// assert_eq!(parse_count("1,000,000"), Ok(1_000_000));
/// assert!(parse_count("ten").is_err());
/// ```
pub fn parse_count(text: &str) -> Result<u64, String> {
    parse_scaled(text, COUNT_UNITS)
        .map_err(|fault| format!("{fault}; a count is written as 15000, 1,000,000, 10k, 1M or 1e6"))
}

/// Parses a rate per second: a count, with or without `/s` after it.
///
/// # Errors
/// A sentence that names the fault and the accepted forms.
///
/// ```
/// use c1000k_host::quantity::parse_rate;
/// assert_eq!(parse_rate("10k/s"), Ok(10_000));
/// assert_eq!(parse_rate("500"), Ok(500));
/// ```
pub fn parse_rate(text: &str) -> Result<u64, String> {
    parse_count(text.trim().strip_suffix("/s").unwrap_or(text))
}

/// Parses a size in bytes: `4096`, `512MiB`, `6G`.
///
/// `K`, `M`, `G`, `T` alone and with `iB` are powers of 1,024; with `B` (`MB`) powers of 1,000.
///
/// # Errors
/// A sentence that names the fault and the accepted forms.
///
/// ```
/// use c1000k_host::quantity::parse_bytes;
/// assert_eq!(parse_bytes("6G"), Ok(6 << 30));
/// assert_eq!(parse_bytes("12MB"), Ok(12_000_000));
/// ```
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    parse_scaled(text, BYTE_UNITS)
        .map_err(|fault| format!("{fault}; a size is written as 4096, 512M, 512MiB, 12MB or 6G"))
}

/// Parses a duration: `10s`, `500ms`, `2m`, `1h 30m`.
///
/// # Errors
/// A sentence that names the fault and the accepted forms.
///
/// ```
/// use {c1000k_host::quantity::parse_duration, std::time::Duration};
/// assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
/// ```
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    if text.trim().starts_with('-') {
        return Err(format!(
            "{text:?} must be positive; a duration is written as 500ms, 10s, 2m or 1h"
        ));
    }
    humantime::parse_duration(text.trim()).map_err(|fault| {
        format!(
            "{text:?} is not a duration ({fault}); a duration is written as 500ms, 10s, 2m or 1h"
        )
    })
}

fn parse_scaled(text: &str, units: &[(&str, u64)]) -> Result<u64, String> {
    let trimmed = text.trim();
    if trimmed.is_empty() {
        return Err("the value is empty".to_owned());
    }
    if trimmed.starts_with('-') {
        return Err(format!("{text:?} must be positive"));
    }
    let unit_start = trimmed
        .find(|c: char| !(c.is_ascii_digit() || matches!(c, '.' | ',' | '_')))
        .unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(unit_start);
    let product = scale_of(unit, units).and_then(|scale| scaled(number, scale));
    // A text that does not begin with a number has no unit.
    let fault = |fault| if number.is_empty() { NOT_A_NUMBER } else { fault };
    product.map_err(|unclear| format!("{text:?} {}", fault(unclear)))
}

fn scale_of(unit: &str, units: &[(&str, u64)]) -> Result<u64, &'static str> {
    let known = units.iter().find(|(name, _)| *name == unit.trim_start());
    known.map(|&(_, scale)| Ok(scale)).or_else(|| power_of_ten(unit)).unwrap_or(Err(UNKNOWN_UNIT))
}

/// The scale of `e6`; `None` if it is not an exponent.
fn power_of_ten(unit: &str) -> Option<Result<u64, &'static str>> {
    let exponent = unit.strip_prefix(['e', 'E'])?;
    let digits = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    if exponent.starts_with('-') {
        return Some(Err(NEGATIVE_EXPONENT));
    }
    Some(digits.parse().ok().and_then(|power| 10_u64.checked_pow(power)).ok_or(TOO_LARGE))
}

/// `number` times `scale`, exactly; a fraction is accepted if the product is whole.
fn scaled(number: &str, scale: u64) -> Result<u64, &'static str> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let whole = ungrouped(whole).ok_or(NOT_A_NUMBER)?;
    if number.ends_with('.') || !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return Err(NOT_A_NUMBER);
    }
    let whole: u64 = whole.parse().map_err(|_| TOO_LARGE)?;
    let base = whole.checked_mul(scale).ok_or(TOO_LARGE)?;
    let fraction = fraction.trim_end_matches('0');
    if fraction.is_empty() {
        return Ok(base);
    }
    let parts = 10_u128.checked_pow(fraction.len() as u32).ok_or("has too many decimals")?;
    let numerator: u128 = fraction.parse().map_err(|_| "has too many decimals")?;
    let product = numerator.checked_mul(u128::from(scale)).ok_or("has too many decimals")?;
    if !product.is_multiple_of(parts) {
        return Err("is not a whole number");
    }
    let added = u64::try_from(product / parts).map_err(|_| TOO_LARGE)?;
    base.checked_add(added).ok_or(TOO_LARGE)
}

/// The digits without the separators between groups of three.
fn ungrouped(digits: &str) -> Option<String> {
    let Some(separator) = digits.chars().find(|c| matches!(c, ',' | '_')) else {
        return (!digits.is_empty()).then(|| digits.to_owned());
    };
    let groups: Vec<&str> = digits.split(separator).collect();
    let plain = |group: &&str| group.bytes().all(|b| b.is_ascii_digit());
    let well_formed = (1..=3).contains(&groups[0].len())
        && groups[1..].iter().all(|group| group.len() == 3)
        && groups.iter().all(plain);
    well_formed.then(|| groups.concat())
}

#[cfg(test)]
mod tests {
    use {super::*, crate::format, proptest::prelude::*};

    #[test]
    fn counts_are_parsed_as_users_type_them() {
        for (text, count) in [
            ("0", 0),
            ("15000", 15_000),
            ("10k", 10_000),
            ("10 k", 10_000),
            (" 1M ", 1_000_000),
            ("2.5M", 2_500_000),
            ("1.50k", 1_500),
            ("1,000,000", 1_000_000),
            ("1_000", 1_000),
            ("1e6", 1_000_000),
            ("2.5E+3", 2_500),
            ("1e0", 1),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_count(text), Ok(count), "{text}");
        }
    }

    #[test]
    fn an_invalid_count_is_refused_with_the_accepted_forms() {
        for text in [
            "",
            " ",
            "ten",
            "k",
            "-5",
            "+5",
            "1,5",
            "1,00",
            ",000",
            "1,000_000",
            "1.",
            ".",
            ".5k",
            "1.2.3",
            "1.2345k",
            "1.1",
            "10kk",
            "10 apples",
            "0x10",
            "1e",
            "e6",
            "1e-6",
            "1e20",
            "1e99999999999",
            "1.5e0",
            "18446744073709551616",
            "18446744073709551615k",
            "1.00000000000000000000000000000000000000000000000000001M",
            "١",
            "99999999999999999999999999999999",
        ] {
            let error = parse_count(text).expect_err(text);
            assert!(error.contains("10k"), "{text}: {error}");
            assert!(!error.contains('\n'), "{text}: {error}");
        }
    }

    #[test]
    fn the_fault_of_a_number_is_named() {
        for (text, fault) in [
            ("1e99", TOO_LARGE),
            ("1E+20", TOO_LARGE),
            ("1e99999999999", TOO_LARGE),
            ("99999999999999999999", TOO_LARGE),
            ("1e-6", NEGATIVE_EXPONENT),
            ("1e3.5", UNKNOWN_UNIT),
            ("1e", UNKNOWN_UNIT),
            ("10kk", UNKNOWN_UNIT),
            ("nan", NOT_A_NUMBER),
            ("k", NOT_A_NUMBER),
            ("e6", NOT_A_NUMBER),
        ] {
            let expected = format!("{text:?} {fault}; a ");
            for error in [parse_count(text), parse_rate(text), parse_bytes(text)] {
                let error = error.expect_err(text);
                assert!(error.starts_with(&expected), "{text}: {error}");
            }
        }
    }

    #[test]
    fn a_rate_may_have_its_unit_and_nothing_is_negative() {
        assert_eq!(parse_rate("1000/s"), Ok(1_000));
        assert_eq!(parse_rate(" 10k /s "), Ok(10_000));
        assert!(parse_rate("1000/m").is_err() && parse_rate("/s").is_err());
        for error in [parse_count("-5"), parse_rate("-5/s"), parse_bytes("-5M")] {
            assert!(
                error.as_ref().is_err_and(|line| line.contains("must be positive")),
                "{error:?}"
            );
        }
        assert!(parse_duration("-5s").is_err_and(|line| line.contains("must be positive")));
    }

    #[test]
    fn sizes_are_binary_except_for_the_decimal_units() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("12M", 12 << 20),
            ("512MiB", 512 << 20),
            ("512 MiB", 512 << 20),
            ("12MB", 12_000_000),
            ("6G", 6 << 30),
            ("0.5G", 1 << 29),
            ("1T", 1 << 40),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for text in ["", "6X", "G", "-1G", "99999999T", "0.3B"] {
            let error = parse_bytes(text).expect_err(text);
            assert!(error.contains("512M"), "{text}: {error}");
        }
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(parse_duration("10s"), Ok(Duration::from_secs(10)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        for text in ["", "10", "s", "-1s", "99999999999999999999s", "10 parsecs"] {
            let error = parse_duration(text).expect_err(text);
            assert!(error.contains("500ms"), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn a_formatted_count_reads_back(count: u64) {
            prop_assert_eq!(parse_count(&format::count(count)), Ok(count));
        }

        #[test]
        fn no_text_breaks_a_parser(text in ".{0,40}", digits in "[0-9.,_kMGTiB ]{0,60}") {
            for text in [text, digits] {
                let _ = (parse_count(&text), parse_bytes(&text), parse_duration(&text));
            }
        }
    }
}
