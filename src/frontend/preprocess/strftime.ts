/**
 * Python's `strftime` in the C locale and local time, for `strftime_now` in chat templates. Unknown directives stay as
 * they are, as glibc leaves them.
 */
const DAYS = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"] as const;
const MONTHS = [
  "January",
  "February",
  "March",
  "April",
  "May",
  "June",
  "July",
  "August",
  "September",
  "October",
  "November",
  "December",
] as const;

export function strftime(date: Date, format: string): string {
  return format.replace(/%(-?)([a-zA-Z%])/g, (directive, unpadded: string, letter: string) => {
    const value = directiveText(date, letter);
    if (value === undefined) return directive;
    return unpadded === "-" ? value.replace(/^[0 ]+(?=\d)/, "") : value;
  });
}

function directiveText(date: Date, letter: string): string | undefined {
  const day = DAYS[date.getDay()] ?? "";
  const month = MONTHS[date.getMonth()] ?? "";
  const hours = date.getHours();
  switch (letter) {
    case "Y":
      return String(date.getFullYear());
    case "y":
      return pad(date.getFullYear() % 100);
    case "m":
      return pad(date.getMonth() + 1);
    case "d":
      return pad(date.getDate());
    case "e":
      return String(date.getDate()).padStart(2, " ");
    case "B":
      return month;
    case "b":
    case "h":
      return month.slice(0, 3);
    case "A":
      return day;
    case "a":
      return day.slice(0, 3);
    case "w":
      return String(date.getDay());
    case "j":
      return pad(dayOfYear(date), 3);
    case "H":
      return pad(hours);
    case "I":
      return pad(hours % 12 === 0 ? 12 : hours % 12);
    case "p":
      return hours < 12 ? "AM" : "PM";
    case "M":
      return pad(date.getMinutes());
    case "S":
      return pad(date.getSeconds());
    case "F":
      return strftime(date, "%Y-%m-%d");
    case "T":
      return strftime(date, "%H:%M:%S");
    case "D":
      return strftime(date, "%m/%d/%y");
    case "R":
      return strftime(date, "%H:%M");
    case "%":
      return "%";
    default:
      return undefined;
  }
}

function dayOfYear(date: Date): number {
  const start = Date.UTC(date.getFullYear(), 0, 0);
  return Math.round((Date.UTC(date.getFullYear(), date.getMonth(), date.getDate()) - start) / 86_400_000);
}

function pad(value: number, digits = 2): string {
  return String(value).padStart(digits, "0");
}
