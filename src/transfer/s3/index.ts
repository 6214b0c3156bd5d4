export { S3Client, s3OptionsFromEnvironment, type ObjectAddress, type S3Options } from "./s3-client.ts";
