//! Sizes, times and shares: as the user writes them and as the user reads them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jiff::civil::{DateTime, Time};
use jiff::tz::TimeZone;
use jiff::{Timestamp, ZonedDateTime};

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

/// A moment to be ready by; `None`: none any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment(pub Option<SystemTime>);

/// TIME: a duration from now, `22:30` (today or tomorrow), or a date and time, `2026-01-31 06:00`, with or without a zone.
pub fn parse_moment(text: &str) -> Result<Moment, String> {
    let now = ZonedDateTime::now();
    let text = text.trim();
    if text == "never" {
        return Ok(Moment(None));
    }
    let zoned = |time: DateTime| time.to_zoned_datetime(now.time_zone().clone()).ok();
    let found = if let Ok(duration) = parse_duration(text) {
        SystemTime::now().checked_add(duration)
    } else if let Ok(time) = text.parse::<Timestamp>() {
        time.try_into().ok()
    } else if let Ok(time) = text.parse::<DateTime>() {
        zoned(time).and_then(|time| time.try_into().ok())
    } else if let Ok(time) = text.parse::<Time>() {
        let today = zoned(now.date().to_datetime(time));
        let next = today.filter(|today| *today > now);
        let next = next.or_else(|| zoned(now.date().tomorrow().ok()?.to_datetime(time)));
        next.and_then(|time| time.try_into().ok())
    } else {
        None
    };
    match found {
        None => Err("expected a time such as 2h, 22:30 or \"2026-01-31 06:00\"".to_owned()),
        Some(time) if time <= SystemTime::now() => Err("this time has passed".to_owned()),
        Some(time) => Ok(Moment(Some(time))),
    }
}

/// For the protocol: milliseconds since the epoch, 0 for none.
pub fn epoch_ms(moment: Moment) -> u64 {
    let since = moment.0.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// The time of day, and the date if it is not today: of an RFC 3339 time.
pub fn local(time: &str) -> String {
    let Ok(time) = time.parse::<Timestamp>() else { return time.to_owned() };
    let (time, now) = (time.to_zoned_datetime(TimeZone::system()), ZonedDateTime::now());
    let format = if time.date() == now.date() { "%H:%M:%S" } else { "%Y-%m-%d %H:%M:%S" };
    time.strftime(format).to_string()
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

/// `2.5 ms`.
pub fn duration(time: Duration) -> String {
    match time.as_secs_f64() {
        seconds if seconds < 1.0 => format!("{:.1} ms", seconds * 1000.0),
        seconds => format!("{seconds:.1} s"),
    }
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
    fn moments_are_times_from_now_times_of_day_and_dates() {
        let day = Duration::from_secs(86_400);
        let now = SystemTime::now();
        let moment = |text: &str| parse_moment(text).unwrap().0.unwrap();
        let from_now = moment("90s").duration_since(now).unwrap();
        assert!(from_now >= Duration::from_secs(90) && from_now < Duration::from_secs(100), "{from_now:?}");
        for hour in 0..24 {
            let left = moment(&format!("{hour:02}:30")).duration_since(now).unwrap();
            assert!(left <= day + Duration::from_secs(3600 + 60), "the next one: {left:?}");
        }
        assert_eq!(moment("2999-01-31T06:00:00Z"), moment("2999-01-31T07:00:00+01:00"));
        assert!(moment("2999-01-31 06:00").duration_since(moment("2999-01-30 06:00")).unwrap() == day);
        assert_eq!(parse_moment("never"), Ok(Moment(None)));
        assert_eq!(epoch_ms(Moment(None)), 0);
        for text in ["2020-01-01T00:00:00Z", "0", "soon", "25:00", ""] {
            assert!(parse_moment(text).is_err(), "{text}");
        }
        assert!(local("2999-01-31T06:00:00Z").contains("2999-01-"));
    }

    #[test]
    fn hundred_percent_is_said_only_when_all_is_done() {
        assert_eq!(percent(999_999, 1_000_000), "99 %");
        assert_eq!(percent(0, 0), "100 %");
        assert_eq!(percent(u64::MAX, u64::MAX), "100 %");
    }
}
