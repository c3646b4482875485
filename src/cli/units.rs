//! Sizes, times and shares: as the user writes them and as the user reads them.

use std::time::Duration;

/// SIZE: bytes, or K, M, G, T as powers of 1024.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let config = parse_size::Config::new().with_binary();
    config
        .parse_size(text)
        .map_err(|_| "expected a size: bytes, or a number with K, M, G or T (powers of 1024)".to_owned())
}

/// DURATION: `50ms`, `2s`, `1h 30min`; a bare number counts seconds.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    if let Ok(seconds) = text.parse::<u64>() {
        return Ok(Duration::from_secs(seconds));
    }
    humantime::parse_duration(text).map_err(|_| "expected a duration such as 50ms, 2s or 1h".to_owned())
}

/// `1.5 GiB`.
pub fn size(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

/// `1.5 GiB/s`.
pub fn rate(bytes_per_second: u64) -> String {
    format!("{}/s", size(bytes_per_second))
}

/// `1h 2m 3s`, without fractions.
pub fn seconds(seconds: u64) -> String {
    humantime::format_duration(Duration::from_secs(seconds)).to_string()
}

/// `45 %`. Never says 100 unless `done` is all of `whole`.
pub fn percent(done: u64, whole: u64) -> String {
    let done = done.min(whole);
    let percent = if whole == 0 { 100 } else { u128::from(done) * 100 / u128::from(whole) };
    format!("{percent} %")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_count_in_powers_of_1024() {
        for (text, bytes) in
            [("4096", 4096), ("64K", 65536), ("64k", 65536), ("1G", 1 << 30), ("2MiB", 2 << 20), ("0", 0)]
        {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "x", "-1", "1Q"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
        assert_eq!(size(3 << 29), "1.50 GiB");
    }

    #[test]
    fn durations_need_no_unit_for_seconds() {
        assert_eq!(parse_duration("50ms"), Ok(Duration::from_millis(50)));
        assert_eq!(parse_duration("2"), Ok(Duration::from_secs(2)));
        assert!(parse_duration("soon").is_err());
    }

    #[test]
    fn hundred_percent_is_said_only_when_all_is_done() {
        assert_eq!(percent(999_999, 1_000_000), "99 %");
        assert_eq!(percent(0, 0), "100 %");
        assert_eq!(percent(u64::MAX, u64::MAX), "100 %");
    }
}
